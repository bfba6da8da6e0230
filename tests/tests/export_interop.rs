//! Exports, as programs use them that know nothing of us: libnbd's tools, QEMU's, fio, the FUSE client. Every test runs on qemu-nbd and
//! nbdkit as well, so that it is known to be right. What clients wrote is read afterwards without NBD: by `cryptctl decrypt`, and
//! where it can by cryptsetup.

use serde_json::Value;
use tests::luks::{SMALL_HEADER, encrypted_by_cryptsetup, have, read_by_cryptsetup, secret};
use tests::nbd::{Kind, Served, and_references, same};
use tests::{Random, seed};

const MIB: usize = 1 << 20;
/// No multiple of a mebibyte, nor of what tools like to ask for at once.
const ODD: usize = 5 * MIB + 12 * 4096;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn nbdinfo_tells_what_an_export_can_do() {
    if !have(&["nbdinfo"]) {
        return;
    }
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, ODD);
        let info = json(&served.shell("nbdinfo --json \"$uri\""));
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["structured"], true);
        let export = &info["exports"][0];
        assert_eq!(export["export-size"], ODD, "{export}");
        assert_eq!(export["contexts"][0], "base:allocation");
        // nbdkit's file plugin has no CACHE of its own, and others differ where they may.
        for (key, expected) in [
            ("is_read_only", false),
            ("can_flush", true),
            ("can_fua", true),
            ("can_multi_conn", true),
            ("can_df", true),
            ("can_zero", true),
            ("can_trim", true),
            ("can_cache", true),
        ] {
            assert_eq!(export[key], expected, "{kind:?}: {key}: {export}");
        }
        if kind.is_ours() {
            assert_eq!(export["block_size_minimum"], 1, "unaligned requests are served");
            assert_eq!(export["block_size_maximum"], 32 << 20);
        }
        let listed = served.shell("nbdinfo --list \"$uri\"");
        assert!(listed.contains(&format!("export-size: {ODD}")), "{listed}");
        for can in ["connect", "flush", "fua", "multi-conn", "structured-reply", "zero"] {
            let _ = served.shell(&format!("nbdinfo --can {can} \"$uri\""));
        }
        let _ = served.shell("! nbdinfo --is read-only \"$uri\"");
        served.stop();
    }
}

#[test]
fn the_map_covers_the_export_and_denies_no_data() {
    if !have(&["nbdinfo"]) {
        return;
    }
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, ODD);
        let map = json(&served.shell("nbdinfo --json --map \"$uri\""));
        let mut at = 0;
        for extent in map.as_array().expect("extents") {
            assert_eq!(extent["offset"], at, "{map}");
            at += extent["length"].as_u64().expect("bytes");
            assert_eq!(extent["type"].as_u64().expect("flags") & 2, 0, "noise is called zero: {map}");
        }
        assert_eq!(at, ODD as u64);
        served.stop();
    }
}

#[test]
fn nbdcopy_copies_both_ways() {
    if !have(&["nbdcopy"]) {
        return;
    }
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, ODD);
        for options in
            ["", "--connections=4 --requests=64", "--synchronous", "--connections=2 --request-size=4194304"]
        {
            let _ = served.shell(&format!("rm -f @/out && nbdcopy {options} \"$uri\" @/out"));
            same(&served.place.read("out"), &served.plain, &format!("{kind:?}, nbdcopy {options}"));
        }
        // Back: a file with data and holes, which nbdcopy turns into WRITE_ZEROES or TRIM.
        let mut new = served.place.noise("new", ODD);
        for hole in [(MIB, 2 * MIB), (3 * MIB + 4096, 3 * MIB + 8192), (ODD - 65536, ODD)] {
            new[hole.0..hole.1].fill(0);
        }
        served.place.write("new", &new);
        for options in ["--flush", "--flush --connections=4 --requests=64", "--flush --destination-is-zero"] {
            if options.contains("is-zero") {
                let zero = vec![0; ODD];
                served.place.write("zero", &zero);
                let _ = served.shell("nbdcopy --flush --allocated @/zero \"$uri\"");
            }
            let _ = served.shell(&format!("nbdcopy {options} @/new \"$uri\" && nbdcopy \"$uri\" @/out"));
            same(&served.place.read("out"), &new, &format!("{kind:?}, nbdcopy {options}"));
        }
        served.stop();
        served.holds(&new);
    }
}

/// What libnbd's own checks would keep from a server goes out as well: `strict 0`.
const SHELL: &str = r#"
import errno
size = h.get_size()
def refused(call, *codes):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum in codes, (error.errnum, error.string, codes)
        return
    assert False, "not refused"
h.set_strict_mode(0)

# Reads and writes that begin and end anywhere.
plain = open(plain_path, "rb").read()
for at, n in ((0, 1), (1, 1), (511, 2), (512, 512), (4095, 2), (1, 4096), (4097, 8191), (size - 1, 1), (size - 5000, 5000)):
    assert h.pread(n, at) == plain[at:at + n], (at, n)
model = bytearray(plain)
def write(data, at, flags=0):
    h.pwrite(data, at, flags)
    model[at:at + len(data)] = data
write(b"x", 4095)
write(b"y" * 4098, 8191)
write(b"z" * 70000, 100003, nbd.CMD_FLAG_FUA)
assert h.pread(200000, 1) == model[1:200001]

# Structured reads with and without DF: data, holes, errors.
def pieces(n, at, flags=0):
    out = bytearray(n)
    seen = []
    def chunk(data, offset, status, error):
        seen.append(status)
        if status == nbd.READ_DATA:
            out[offset - at:offset - at + len(data)] = data
        else:
            assert status == nbd.READ_HOLE
    h.pread_structured(n, at, chunk, flags)
    return bytes(out), seen
out, seen = pieces(65536, 12345)
assert out == model[12345:12345 + 65536]
out, seen = pieces(65536, 12345, nbd.CMD_FLAG_DF)
assert out == model[12345:12345 + 65536] and len(seen) == 1

# Zeroes: aligned, not aligned, durable, without a hole; fast only if it is fast.
for at, n, flags in ((65536, 65536, 0), (131073, 4095, 0), (140001, 9001, nbd.CMD_FLAG_FUA), (160000, 8192, nbd.CMD_FLAG_NO_HOLE)):
    h.zero(n, at, flags)
    model[at:at + n] = bytes(n)
assert h.pread(200000, 0) == model[:200000]
if h.can_fast_zero():
    try:
        h.zero(65536, 262144, nbd.CMD_FLAG_FAST_ZERO)
        model[262144:262144 + 65536] = bytes(65536)
    except nbd.Error as error:
        assert error.errnum in (errno.ENOTSUP, errno.EOPNOTSUPP), error.string
assert h.pread(65536, 262144) == model[262144:262144 + 65536]

# TRIM may do nothing; elsewhere nothing changes.
h.trim(65536, 1048576)
assert h.pread(65536, 1048576 - 65536) == model[1048576 - 65536:1048576]
assert h.pread(65536, 1048576 + 65536) == model[1048576 + 65536:1048576 + 131072]
h.pwrite(bytes(65536), 1048576)
model[1048576:1048576 + 65536] = bytes(65536)

# Behind the end, at 64-bit edges, empty, of unknown flags: refused, and the connection goes on.
# The protocol wants ENOSPC for writes behind the end; all of the others are EINVAL.
refused(lambda: h.pread(1, size), errno.EINVAL)
refused(lambda: h.pread(2, size - 1), errno.EINVAL)
refused(lambda: h.pread(512, 2**63), errno.EINVAL)
refused(lambda: h.pread(512, 2**64 - 512), errno.EINVAL)
refused(lambda: h.pwrite(b"12", size - 1), errno.ENOSPC, errno.EINVAL)
refused(lambda: h.pwrite(b"12", 2**64 - 1), errno.ENOSPC, errno.EINVAL)
refused(lambda: h.zero(4096, size - 1), errno.ENOSPC, errno.EINVAL)
refused(lambda: h.zero(0xffffffff, 4096), errno.ENOSPC, errno.EINVAL)
refused(lambda: h.trim(4096, size - 1), errno.EINVAL)
refused(lambda: h.trim(0xffffffff, 0), errno.EINVAL)
refused(lambda: h.cache(4096, size - 1), errno.EINVAL)
refused(lambda: h.flush(1 << 9), errno.EINVAL)
refused(lambda: h.pread(512, 0, 1 << 9), errno.EINVAL)
h.cache(65536, 0)
h.flush()

# Block status: all of it in one request or more, and one extent only.
def status(n, at, flags=0):
    got = []
    def extents(context, offset, entries, error):
        assert context == "base:allocation" and offset == at
        got.extend(zip(entries[::2], entries[1::2]))
    h.block_status(n, at, extents, flags)
    return got
assert h.can_meta_context("base:allocation")
at = 0
while at < size:
    for n, flags in status(size - at, at):
        assert not flags & 2 or h.pread(n, at) == bytes(n), "not zero"
        at += n
assert at == size
assert len(status(size, 0, nbd.CMD_FLAG_REQ_ONE)) == 1
refused(lambda: status(4096, size), errno.EINVAL)

# Many in flight, answered in any order.
todo = []
for i in range(64):
    buf = nbd.Buffer(4096 + i)
    todo.append((h.aio_pread(buf, i * 5000), buf, i))
while todo:
    h.poll(-1)
    for entry in list(todo):
        if h.aio_command_completed(entry[0]):
            cookie, buf, i = entry
            assert buf.to_bytearray() == model[i * 5000:i * 5000 + 4096 + i]
            todo.remove(entry)
assert h.pread(size, 0) == model
h.shutdown()
open(model_path, "wb").write(model)
"#;

#[test]
fn a_script_uses_every_command_and_flag() {
    if !have(&["nbdsh", "python3"]) {
        return;
    }
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, ODD);
        let script = format!(
            "plain_path, model_path, uri = \"@/plain\", \"@/model\", \"{}\"\n\
             h.add_meta_context(\"base:allocation\")\nh.connect_uri(uri)\n{SHELL}",
            served.uri()
        );
        served.place.write("script.py", served.place.expand(&script).as_bytes());
        let ran = served.place.shell("nbdsh -c - < @/script.py");
        if ran.stderr.contains("No module named") {
            return tests::skip("no python3-libnbd");
        }
        let _ = ran.done();
        served.stop();
        served.holds(&served.place.read("model"));
    }
}

#[test]
fn a_script_does_without_structured_replies() {
    if !have(&["nbdsh", "python3"]) {
        return;
    }
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(512)]) {
        let mut served = Served::over_noise(kind, ODD);
        let script = format!(
            r#"
h.set_request_structured_replies(False)
h.connect_uri("{}")
assert not h.get_structured_replies_negotiated()
plain = open("@/plain", "rb").read()
assert h.pread(h.get_size(), 0) == plain
h.pwrite(b"old client", 4090)
h.set_strict_mode(0)
for call in (lambda: h.block_status(4096, 0, lambda *_: 0), lambda: h.pread(512, 0, nbd.CMD_FLAG_DF)):
    try:
        call()
    except nbd.Error:
        continue
    # DF without structured replies may be ignored.
assert h.pread(10, 4090) == b"old client"
h.shutdown()
"#,
            served.uri()
        );
        served.place.write("script.py", served.place.expand(&script).as_bytes());
        let ran = served.place.shell("nbdsh -c - < @/script.py");
        if ran.stderr.contains("No module named") {
            return tests::skip("no python3-libnbd");
        }
        let _ = ran.done();
        let mut expected = served.plain.clone();
        expected[4090..4100].copy_from_slice(b"old client");
        served.stop();
        served.holds(&expected);
    }
}

#[test]
fn a_script_haggles() {
    if !have(&["nbdsh", "python3"]) {
        return;
    }
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served = Served::over_noise(kind, MIB);
        let script = format!(
            r#"
names = []
h.set_opt_mode(True)
h.connect_uri("{}")
h.opt_list(lambda name, description: names.append(name))
assert "" in names, names
h.add_meta_context("base:")
found = []
h.opt_list_meta_context(lambda name: found.append(name))
assert found == ["base:allocation"], found
h.clear_meta_contexts()
h.opt_info()
assert h.get_size() == {MIB}
h.set_export_name("no such export")
try:
    h.opt_info()
    assert {any_name}, "an export of any name"
except nbd.Error:
    pass
h.set_export_name("")
h.set_full_info(True)
h.add_meta_context("base:allocation")
h.add_meta_context("x-nobody:knows")
h.opt_go()
assert h.can_meta_context("base:allocation") and not h.can_meta_context("x-nobody:knows")
assert len(h.pread(4096, 0)) == 4096
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri("{}")
h.opt_abort()
"#,
            served.uri(),
            served.uri(),
            // nbdkit's file plugin serves every name.
            any_name = if kind == Kind::Nbdkit { "True" } else { "False" },
        );
        served.place.write("script.py", script.as_bytes());
        let ran = served.place.shell("nbdsh -c - < @/script.py");
        if ran.stderr.contains("No module named") {
            return tests::skip("no python3-libnbd");
        }
        let _ = ran.done();
        served.stop();
    }
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    if !have(&["qemu-img"]) {
        return;
    }
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, ODD);
        let info = json(&served.shell("qemu-img info --output=json \"$uri\""));
        assert_eq!(info["virtual-size"], ODD, "{info}");
        let _ = served.shell("qemu-img compare -f raw -F raw \"$uri\" @/plain");
        let _ = served.shell(
            "qemu-img convert -f raw -O qcow2 \"$uri\" @/out.qcow2 && qemu-img compare @/out.qcow2 @/plain",
        );
        let _ = served.shell("qemu-img convert -m 8 -W -f raw -O raw \"$uri\" @/out");
        same(&served.place.read("out"), &served.plain, "qemu-img convert");
        // The other way, with zeros and with clusters that are not there.
        let mut new = served.place.noise("new", ODD);
        new[MIB..2 * MIB].fill(0);
        new[3 * MIB + 512..3 * MIB + 1024].fill(0);
        served.place.write("new", &new);
        let _ = served.shell(
            "qemu-img convert -f raw -O qcow2 @/new @/new.qcow2 &&
             qemu-img convert -n -m 8 -W -f qcow2 -O raw @/new.qcow2 \"$uri\" &&
             qemu-img compare -f raw -F qcow2 \"$uri\" @/new.qcow2",
        );
        let map = json(&served.shell("qemu-img map --output=json -f raw \"$uri\""));
        let bytes: u64 = map
            .as_array()
            .expect("extents")
            .iter()
            .map(|extent| extent["length"].as_u64().expect("bytes"))
            .sum();
        assert_eq!(bytes, ODD as u64, "{map}");
        for extent in map.as_array().expect("extents").iter().filter(|extent| extent["zero"] == true) {
            let [start, length] = ["start", "length"]
                .map(|key| usize::try_from(extent[key].as_u64().expect("bytes")).expect("in memory"));
            assert!(new[start..start + length].iter().all(|byte| *byte == 0), "not zero: {extent}");
        }
        served.stop();
        served.holds(&new);
    }
}

#[test]
fn qemu_io_verifies_random_patterns() {
    if !have(&["qemu-io"]) {
        return;
    }
    let seed = seed();
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, ODD);
        let mut random = Random::new(seed);
        let mut model = served.plain.clone();
        let mut script = String::new();
        for round in 0..300_usize {
            let pattern = u8::try_from(1 + round % 250).expect("a byte");
            let length = 1 + random.below(if round % 10 == 0 { 600_000 } else { 20_000 });
            let at = random.below(ODD - length);
            match random.below(8) {
                0 => {
                    model[at..at + length].fill(0);
                    script.push_str(&format!("write -z {at} {length}\n"));
                }
                1 => {
                    model[at..at + length].fill(pattern);
                    script.push_str(&format!("write -f -P {pattern} {at} {length}\n"));
                }
                2 => script.push_str(
                    &format!("flush\nblock_status {at} {length}\n").replace("block_status", "read"),
                ),
                _ => {
                    model[at..at + length].fill(pattern);
                    // Two more in flight beside it, elsewhere, and its own verification at once.
                    script.push_str(&format!("aio_write -P {pattern} {at} {length}\n"));
                    script.push_str(&format!("aio_flush\nread -P {pattern} {at} {length}\n"));
                }
            }
        }
        served.place.write("commands", script.as_bytes());
        let said = served.shell("qemu-io -f raw \"$uri\" < @/commands 2>&1");
        for bad in ["Pattern verification failed", "failed:", "error"] {
            assert!(!said.contains(bad), "{kind:?}: {said}");
        }
        served.stop();
        served.holds(&model);
    }
}

#[test]
fn fio_verifies_what_it_writes() {
    if !have(&["fio"]) {
        return;
    }
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, 16 * MIB);
        // From half a kibibyte to a quarter mebibyte, at any 512 bytes; three jobs with a part each.
        let _ = served.shell(
            "cd @/ && fio --ioengine=nbd --uri=\"$uri\" --rw=randrw --bsrange=512-256k --bs_unaligned=0 --blockalign=512 \
             --iodepth=16 --size=5m --offset_increment=5m --numjobs=3 --thread --loops=2 --name=mixed \
             --verify=crc32c --verify_fatal=1 --verify_backlog=64 --fsync=32 --minimal",
        );
        // Nothing is aligned at all.
        let _ = served.shell(
            "cd @/ && fio --ioengine=nbd --uri=\"$uri\" --rw=randwrite --bsrange=513-70000 --bs_unaligned=1 \
             --iodepth=8 --size=4m --name=crooked --verify=crc32c --verify_fatal=1 --minimal",
        );
        served.stop();
    }
}

#[test]
fn a_file_of_fuse_is_an_export() {
    if !have(&["nbdfuse"]) {
        return;
    }
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(512)]) {
        let mut served = Served::over_noise(kind, ODD);
        let mut command = served.place.script("mkdir -p @/mnt && exec nbdfuse -P @/pid @/mnt/disk \"$uri\"");
        command.env("uri", served.uri());
        let mut running = served.place.launch(command);
        tests::eventually("nbdfuse is ready, or has given up", || {
            served.place.path("pid").exists() || !running.is_running()
        });
        if !running.is_running() {
            return tests::skip(&format!("nbdfuse does not run here: {}", running.said()));
        }
        let mut expected = served.plain.clone();
        let _ = served.shell(
            "cmp @/mnt/disk @/plain &&
             printf 'over the border' | dd of=@/mnt/disk bs=1 seek=4090 conv=notrunc status=none &&
             dd if=@/plain of=@/mnt/disk bs=64k seek=16 count=4 conv=notrunc,fsync status=none",
        );
        expected[4090..4105].copy_from_slice(b"over the border");
        expected.copy_within(0..4090, 0);
        let head = served.plain[..4 << 16].to_vec();
        expected[16 << 16..20 << 16].copy_from_slice(&head);
        let _ = served.shell("umount @/mnt/disk 2>/dev/null || umount @/mnt");
        let _ = running.wait();
        served.stop();
        served.holds(&expected);
    }
}

#[test]
fn cryptsetup_makes_a_volume_clients_write_and_cryptsetup_reads_it() {
    if !have(&["cryptsetup", "nbdcopy"]) {
        return;
    }
    for unit in [512, 4096] {
        let mut served = Served::prepared(Kind::LUKS2, ODD, "");
        secret(&served.place, "pass", b"correct horse battery staple");
        let options = format!("--sector-size {unit} --pbkdf pbkdf2 --pbkdf-force-iterations 1000");
        encrypted_by_cryptsetup(&served.place, "plain", "volume", "pass", &options);
        served.start();
        let _ = served.shell("nbdcopy \"$uri\" @/out");
        same(&served.place.read("out"), &served.plain, "of cryptsetup");
        let mut new = served.place.noise("new", ODD - 4096);
        new.extend_from_slice(&served.plain[ODD - 4096..]);
        let _ = served.shell("nbdcopy --flush --connections=2 @/new \"$uri\"");
        served.stop();
        served.holds(&new);
        // Its decryption needs room behind the data.
        let _ = served.shell(&format!("truncate -s +{} @/volume", 2 * SMALL_HEADER));
        let found = read_by_cryptsetup(&served.place, "volume", "pass", ODD);
        same(&found, &new, "as cryptsetup reads it");
    }
}
