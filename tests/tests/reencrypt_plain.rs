//! Plain data that becomes a volume in its place, and a volume that becomes plain data: begun and finished by us and by cryptsetup, at rest and
//! interrupted. What counts is all of the plaintext.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use engine::crypto::Secret;
use engine::error::{Error, ErrorKind};
use engine::format::luks2::reencrypt::{Direction, Mode};
use engine::volume::Header;
use engine::volume::reencrypt::begin::{self, Wish};
use engine::volume::reencrypt::{Opened, open, shift};
use proto::luks::{KdfKind, KdfWish};
use proto::reencrypt::{Luks, Resilience};
use tests::luks2::{QUICK, cryptsetup_does, has_cryptsetup};
use tests::rewrite::{
    Until, bytes_of, cryptsetup_resumes, device, go_on, is_under_way, plaintext, read_by_cryptsetup, secret,
};
use tests::{Random, Scratch, seed, skip};

const DATA: u64 = (5 << 20) + 3 * 4096;
const STEP: u64 = 1 << 20;
const PASS: &str = "correct horse";
/// Free bytes at the end; half of them become the header.
const REDUCE: u64 = 4 << 20;

fn never() -> bool {
    false
}

/// New keyslots that cost nothing.
fn quick() -> Luks {
    let kdf = KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(1000), ..KdfWish::default() };
    Luks { kdf: Some(kdf), ..Luks::default() }
}

struct Data {
    scratch: Scratch,
    path: PathBuf,
    header: Option<PathBuf>,
    plain: Vec<u8>,
}

impl Data {
    /// Plain data with so many bytes behind it that are free.
    fn new(data: u64, free: u64, detached: bool) -> Self {
        let scratch = Scratch::new();
        let mut plain = vec![0; usize::try_from(data).expect("small")];
        Random::new(data).fill(&mut plain);
        let path = scratch.file("data", &plain);
        let file = std::fs::File::options().write(true).open(&path).expect("open");
        file.set_len(data + free).expect("longer");
        scratch.file("pass", PASS.as_bytes());
        let header = detached.then(|| scratch.file("header", &[]));
        Self { scratch, path, header, plain }
    }

    /// A volume whose header is elsewhere, made and filled by cryptsetup.
    fn volume(unit: u32) -> Self {
        let made = Self::new(DATA, 0, true);
        let header = made.header.as_ref().expect("detached");
        let encrypt = format!(
            "reencrypt -q --encrypt --type luks2 --sector-size {unit} --key-file {} --header {}",
            made.pass_file().display(),
            header.display()
        );
        std::fs::remove_file(header).expect("cryptsetup makes it anew");
        cryptsetup_does(&[&encrypt, &QUICK.join(" ")], &[&made.path]);
        assert!(std::fs::read(&made.path).expect("read") != made.plain);
        made
    }

    fn header(&self) -> &Path {
        self.header.as_deref().unwrap_or(&self.path)
    }

    fn pass_file(&self) -> PathBuf {
        self.scratch.join("pass")
    }

    fn luks(&self) -> Luks {
        let header = self.header.as_ref().map(|_| proto::luks::File { fd: 0, name: "header".into() });
        let reduce_bytes = self.header.is_none().then_some(REDUCE);
        Luks { header, reduce_bytes, ..quick() }
    }

    fn begin(&self, luks: &Luks, mode: Mode, resilience: Option<Resilience>) -> Result<Opened, Error> {
        let wish = Wish {
            mode,
            luks,
            resilience,
            data_bytes: bytes_of(&self.path),
            block_bytes: 4096,
            atomic_bytes: 4096,
        };
        let (keys, new): (Vec<Secret>, _) = match mode {
            Mode::Encrypt => (Vec::new(), Some(secret(PASS))),
            _ => (vec![secret(PASS)], None),
        };
        begin::begin(device(self.header()), &mut device(&self.path), &wish, &keys, new.as_ref(), &never)
    }

    fn encrypt(&self, resilience: Option<Resilience>, unit: u32) -> Opened {
        let luks = Luks { data_unit: Some(unit), ..self.luks() };
        self.begin(&luks, Mode::Encrypt, resilience).expect("begun")
    }

    fn open(&self) -> Result<Option<Opened>, Error> {
        let data = bytes_of(&self.path);
        let keys = [secret(PASS)];
        Ok(open::open(device(self.header()), &mut device(&self.path), data, &keys, &never)?.under())
    }

    fn cryptsetup_resumes(&self) {
        cryptsetup_resumes(&self.path, self.header.as_deref(), &self.pass_file());
    }

    /// Let go of it at `until`; if that is not its end, we (in steps of `step` bytes) or cryptsetup bring it there.
    fn goes_on(&self, opened: Opened, until: Until, ours: Option<u64>, what: &str) {
        if go_on(opened, &self.path, STEP, until) {
            return;
        }
        let Some(step) = ours else { return self.cryptsetup_resumes() };
        let opened = self.open().expect("opens").expect("under way");
        // With its last step recovered nothing may be left of what was moved.
        let is_over = opened.moved.is_some() && opened.boundary == 0;
        assert!(is_over || plaintext(&opened, &self.path) == self.plain, "{what}: at rest");
        assert!(go_on(opened, &self.path, step, Until::Done), "{what}");
    }

    /// All is encrypted and over, and cryptsetup reads all of it.
    fn is_encrypted(&self, what: &str) {
        assert!(!is_under_way(self.header()), "{what}");
        assert!(self.open().expect("nothing is wrong").is_none(), "{what}");
        let read = read_by_cryptsetup(
            &self.path,
            self.header.as_deref(),
            &self.pass_file(),
            self.scratch.path(),
            self.plain.len() as u64,
        );
        assert!(read == self.plain, "{what}: plaintext");
        let raw = std::fs::read(&self.path).expect("read");
        for piece in self.plain.chunks(4096).step_by(61) {
            assert!(
                !raw.windows(4096).step_by(4096).any(|window| window == piece),
                "{what}: plaintext is left"
            );
        }
    }

    fn is_plain(&self, what: &str) {
        assert!(!is_under_way(self.header()), "{what}");
        assert!(std::fs::read(&self.path).expect("read") == self.plain, "{what}");
    }
}

#[test]
fn plain_data_becomes_a_volume_with_a_detached_header() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for (resilience, unit) in
        [(Resilience::Checksum, 512), (Resilience::Checksum, 4096), (Resilience::Journal, 4096)]
    {
        for until in [
            Until::Done,
            Until::Within(0, 500),
            Until::Within(2, 500),
            Until::Steps(3),
            Until::Within(5, 500),
        ] {
            for ours in [true, false].into_iter().take(if until == Until::Done { 1 } else { 2 }) {
                let what = format!("{resilience:?}, {unit}, {until:?}, ours: {ours}");
                let data = Data::new(DATA, 0, true);
                let opened = data.encrypt(Some(resilience), unit);
                assert!(std::fs::read(&data.path).expect("read") == data.plain, "{what}: begun");
                data.goes_on(opened, until, ours.then_some(STEP), &what);
                data.is_encrypted(&what);
            }
        }
    }
}

#[test]
fn plain_data_moves_out_of_the_way_of_its_header() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    // More than the shift, less, and a multiple of it; the last steps take the bytes that were moved first.
    for (bytes, steps) in [(DATA, 6), (1 << 20, 1), (REDUCE / 2 + 4096, 3)] {
        let mut cuts = vec![Until::Done];
        for step in 0..steps {
            cuts.extend([Until::Steps(step), Until::Within(step, 500)]);
        }
        for (cut, until) in cuts.into_iter().enumerate() {
            // cryptsetup goes on from every other one: it takes its time.
            for ours in [true, false].into_iter().take(if cut % 2 == 1 { 2 } else { 1 }) {
                let what = format!("{bytes} bytes, {until:?}, ours: {ours}");
                let data = Data::new(bytes, REDUCE, false);
                let opened = data.encrypt(None, 4096);
                assert_eq!((opened.direction, opened.boundary), (Direction::Backward, bytes), "{what}");
                assert!(plaintext(&opened, &data.path) == data.plain, "{what}: begun");
                assert!(opened.ledger.hotzone_max().is_some(), "{what}: no further than what was moved");
                data.goes_on(opened, until, ours.then_some(REDUCE), &what);
                data.is_encrypted(&what);
            }
        }
    }
}

#[test]
fn a_header_that_was_cut_off_is_taken_back() {
    let data = Data::new(DATA, REDUCE, false);
    let before = std::fs::read(&data.path).expect("read");
    drop(data.encrypt(None, 512));
    let after = std::fs::read(&data.path).expect("read");
    let half = usize::try_from(REDUCE / 2).expect("small");
    // The marker is what was there between: sector 0 by the layout of its module, made anew here.
    let marker = marker(&data);
    // As the device is when power is cut: the moved copy, the marker, and of the header what was written until then. The second copy lies at
    // 16384; without its last sector it is none.
    let all_but_copies = |keep: std::ops::Range<usize>| {
        let mut bytes = before.clone();
        bytes[after.len() - half..].copy_from_slice(&after[after.len() - half..]);
        bytes[keep.clone()].copy_from_slice(&after[keep]);
        bytes[..512].copy_from_slice(&marker);
        bytes
    };
    for keep in [0..0, 32768..half, 16384..16384 + 512, 16384 + 512..half, 16384..16384 + 4096] {
        std::fs::write(&data.path, all_but_copies(keep.clone())).expect("written");
        assert!(shift::is_marked(&mut device(&data.path)).expect("read"));
        let error = Header::load(&mut device(&data.path)).expect_err("no header yet");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{keep:?}");
        assert!(data.open().expect("put back").is_none());
        assert!(std::fs::read(&data.path).expect("read").starts_with(&data.plain), "{keep:?}");
        // And it can begin again at once.
        std::fs::write(&data.path, all_but_copies(keep.clone())).expect("written");
        let opened = data.encrypt(None, 512);
        assert!(opened.notes.iter().any(|note| note.contains("taken back")), "{:?}", opened.notes);
        assert!(plaintext(&opened, &data.path) == data.plain, "{keep:?}");
    }
    // With its second copy whole it is a volume, and goes on.
    std::fs::write(&data.path, all_but_copies(16384..half)).expect("written");
    let opened = data.open().expect("opens").expect("under way");
    assert!(plaintext(&opened, &data.path) == data.plain);
    assert!(go_on(opened, &data.path, REDUCE, Until::Done));
    // A copy that is another by now is not brought back.
    let mut other = all_but_copies(0..0);
    let last = other.len() - 1;
    other[last] ^= 1;
    std::fs::write(&data.path, &other).expect("written");
    assert_eq!(data.open().err().expect("another copy").kind(), ErrorKind::Damaged);
    assert!(std::fs::read(&data.path).expect("read") == other, "nothing was written");
}

/// The marker's sector, by the table of its module.
fn marker(data: &Data) -> Vec<u8> {
    let sha256 = |bytes: &[u8]| {
        let mut sum = vec![0; 32];
        engine::crypto::hash::Hash::Sha256.digest(&[bytes], &mut sum);
        sum
    };
    let moved = &data.plain[..usize::try_from(REDUCE / 2).expect("small").min(data.plain.len())];
    let sums: Vec<u8> = moved.chunks(1 << 20).flat_map(sha256).collect();
    let mut sector = b"cryptctl-moved\0\0".to_vec();
    sector.extend((DATA + REDUCE / 2).to_be_bytes());
    sector.extend((moved.len() as u64).to_be_bytes());
    sector.extend(sha256(&sums));
    sector.extend(sha256(&sector));
    sector.resize(512, 0);
    sector
}

#[test]
fn a_volume_becomes_plain_data() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for (resilience, unit) in [
        (Resilience::Checksum, 512),
        (Resilience::Checksum, 4096),
        (Resilience::Journal, 512),
        (Resilience::None, 4096),
    ] {
        let cuts =
            [Until::Done, Until::Steps(0), Until::Within(0, 500), Until::Steps(3), Until::Within(5, 500)];
        for until in cuts.into_iter().filter(|until| resilience != Resilience::None || *until == Until::Done)
        {
            for ours in [true, false].into_iter().take(if until == Until::Done { 1 } else { 2 }) {
                let what = format!("{resilience:?}, {unit}, {until:?}, ours: {ours}");
                let data = Data::volume(unit);
                let luks = Luks { reduce_bytes: None, ..data.luks() };
                let opened = data.begin(&luks, Mode::Decrypt, Some(resilience)).expect("begun");
                data.goes_on(opened, until, ours.then_some(STEP), &what);
                data.is_plain(&what);
            }
        }
    }
}

/// Kill a re-encryption by cryptsetup.
fn killed(data: &Data, options: &str, after: Duration) {
    let words =
        format!("reencrypt -q --force-offline-reencrypt --key-file {} {options}", data.pass_file().display());
    let mut child = Command::new("cryptsetup")
        .args(words.split_whitespace())
        .args(QUICK.iter().flat_map(|words| words.split_whitespace()))
        .arg(&data.path)
        .current_dir(data.scratch.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("cryptsetup starts");
    std::thread::sleep(after);
    let _ = child.kill();
    child.wait().expect("waited");
}

#[test]
fn we_finish_what_cryptsetup_began_to_encrypt() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let seed = seed();
    let mut random = Random::new(seed);
    let mut found = [0_u32; 2];
    for round in 0..8 {
        let detached = round % 2 == 1;
        let data = Data::new(48 << 20, if detached { 0 } else { REDUCE }, detached);
        if let Some(header) = &data.header {
            std::fs::remove_file(header).expect("cryptsetup makes it anew");
        }
        let options = match &data.header {
            Some(header) => {
                format!("--encrypt --type luks2 --hotzone-size 512k --header {}", header.display())
            }
            None => format!("--encrypt --type luks2 --reduce-device-size {REDUCE}"),
        };
        killed(&data, &options, Duration::from_micros(200_000 + random.below(400_000) as u64));
        if data.header.as_ref().is_some_and(|header| !header.exists()) {
            continue;
        }
        // Otherwise not begun (cryptsetup writes its header twice before it says so), or over.
        if let Ok(Some(opened)) = data.open() {
            found[usize::from(opened.recovered_bytes > 0)] += 1;
            assert!(plaintext(&opened, &data.path) == data.plain, "seed {seed}: round {round}");
            assert!(go_on(opened, &data.path, REDUCE, Until::Done));
            data.is_encrypted(&format!("seed {seed}: round {round}"));
        }
    }
    eprintln!("at rest: {}, within a step: {}", found[0], found[1]);
    assert!(found[0] + found[1] > 0, "seed {seed}: no kill fell into it");
}

#[test]
fn we_finish_what_cryptsetup_began_to_decrypt() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let data = Data::volume(512);
    let header = data.header.as_ref().expect("detached").display().to_string();
    let init = format!(
        "reencrypt -q --decrypt --init-only --force-offline-reencrypt --key-file {} --header {header}",
        data.pass_file().display()
    );
    cryptsetup_does(&[&init], &[&data.path]);
    let opened = data.open().expect("opens").expect("under way");
    assert_eq!((opened.mode, opened.direction, opened.boundary), (Mode::Decrypt, Direction::Backward, DATA));
    assert!(plaintext(&opened, &data.path) == data.plain);
    assert!(!go_on(opened, &data.path, STEP, Until::Within(2, 500)));
    let opened = data.open().expect("opens").expect("under way");
    assert_eq!((opened.recovered_bytes, opened.boundary), (STEP, DATA - 3 * STEP));
    assert!(plaintext(&opened, &data.path) == data.plain);
    assert!(!go_on(opened, &data.path, STEP, Until::Within(1, 500)));
    data.cryptsetup_resumes();
    data.is_plain("backward");
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    let data = Data::new(DATA, REDUCE, false);
    let before = std::fs::read(&data.path).expect("read");
    let attached = data.luks();
    let cases: [(Luks, Option<Resilience>, ErrorKind, &str); 6] = [
        (quick(), None, ErrorKind::Invalid, "no place for the header"),
        (Luks { reduce_bytes: Some(8192 + 512), ..quick() }, None, ErrorKind::Invalid, "multiple of 8192"),
        (
            Luks { reduce_bytes: Some(64 << 10), ..quick() },
            None,
            ErrorKind::Invalid,
            "no room for the header",
        ),
        (
            Luks { reduce_bytes: Some(DATA + REDUCE + 4096), ..quick() },
            None,
            ErrorKind::NoSpace,
            "leave none for data",
        ),
        (attached.clone(), Some(Resilience::Checksum), ErrorKind::Invalid, "protected by moving only"),
        (Luks { data_unit: Some(3000), ..attached.clone() }, None, ErrorKind::Invalid, "3000"),
    ];
    for (luks, resilience, kind, words) in cases {
        let refused = data.begin(&luks, Mode::Encrypt, resilience).err().expect(words);
        assert!(refused.chain().contains(words), "{}", refused.chain());
        assert_eq!(refused.kind(), kind, "{}", refused.chain());
    }
    let wish = Wish {
        mode: Mode::Encrypt,
        luks: &attached,
        resilience: None,
        data_bytes: DATA + REDUCE,
        block_bytes: 512,
        atomic_bytes: 512,
    };
    let refused = begin::begin(device(&data.path), &mut device(&data.path), &wish, &[], None, &never);
    assert_eq!(refused.err().expect("no passphrase").kind(), ErrorKind::Invalid);
    let planned =
        begin::plan(&mut device(&data.path), &wish, &[], Some(&secret(PASS)), &never).expect("planned");
    assert_eq!((planned.total, planned.hotzone_max), (DATA, Some(REDUCE / 2)));
    assert!(std::fs::read(&data.path).expect("read") == before, "nothing was written");
    // What is a volume already is not encrypted once more.
    drop(data.encrypt(None, 512));
    let now = std::fs::read(&data.path).expect("read");
    let refused = data.begin(&attached, Mode::Encrypt, None).err().expect("a volume");
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{}", refused.chain());
    assert!(std::fs::read(&data.path).expect("read") == now, "nothing was written");
}
