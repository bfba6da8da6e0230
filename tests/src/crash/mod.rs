//! Re-encryptions on simulated disks that lose power: small volumes, what becomes of them, and whether what is found
//! afterwards is whole.
//!
//! | file | its one purpose |
//! |---|---|
//! | `around` | a ledger around another one |
//! | `mod` | the shapes of volumes and re-encryptions, and the disks they begin on |
//! | `course` | the production code, from the beginning or from what was found to the end |
//! | `judge` | what a disk holds, compared with the plaintext byte by byte |
//! | `proof` | every cut of a whole re-encryption, of its recovery, and of that one's recovery |
//! | `online` | clients that read and write meanwhile, and what they may find after a cut |
//! | `raw` | the same of volumes without a header |
//! | `same_boot` | failures that leave what is visible without being durable, and power cuts of what is resumed from that |
//! | `wrong` | orders that lose data, to see that they are found |

pub mod around;
pub mod course;
pub mod judge;
pub mod online;
pub mod proof;
pub mod raw;
pub mod same_boot;
pub mod wrong;

use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, World};
use engine::crypto::spec::CipherSpec;
use engine::crypto::{Kernel, Secret, SectorCipher};
use engine::format::luks2::reencrypt::Mode;
use engine::units::DataUnit;
use engine::volume::Header;
use engine::volume::create::{self, NewHeader, Place};
use proto::luks::{KdfKind, KdfWish, New, Version};
use proto::reencrypt::Resilience;

use crate::jobs::noise;

/// The disk of the header; of everything, where that is attached.
pub const HEADER: usize = 0;

/// Opens the volumes, before and after.
pub const ALICE: &str = "alice's passphrase";
/// Opens those with two keyslots, too.
pub const BOB: &str = "bob's passphrase";

/// Bytes of both copies of the header.
const METADATA: u64 = 2 * 16_384;
/// Bytes of a keyslot's material: a key of 32 bytes, split into 4000.
const KEYSLOT: u64 = 128 << 10;
/// Bytes of the header that plain data makes room for; as many more are free.
const SHIFT: u64 = 256 << 10;

/// A volume and what is to become of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What becomes of it.
    pub mode: Mode,
    /// How steps are protected; where plain data makes room for a header, it is the shift.
    pub resilience: Resilience,
    /// Data unit of before and after, bytes.
    pub units: [u32; 2],
    /// Bytes of plaintext.
    pub data: usize,
    /// Bytes of the area, and so the length of a hotzone, unless the next is less.
    pub area: u64,
    /// Most bytes of a hotzone.
    pub hotzone: u64,
    /// Bytes a worker takes at a time.
    pub chunk: u32,
    /// The header lies on a disk of its own.
    pub detached: bool,
    /// What a disk writes whole or not at all, bytes.
    pub sector: u32,
    /// Keyslots: 1 or 2.
    pub keyslots: usize,
}

/// What the disks hold before, and what is known of it.
pub struct Volume {
    /// How it is made.
    pub shape: Shape,
    /// The disks.
    pub disks: Vec<(Image, DiskOptions)>,
    /// What its data is.
    pub plain: Vec<u8>,
    /// The key, as it is before, and the salt of its digest; none of plain data.
    pub old: Option<(Secret, Vec<u8>)>,
}

/// These bytes as a secret.
#[must_use]
pub fn secret(text: &str) -> Secret {
    Secret::copy_of(text.as_bytes()).expect("memory for a secret")
}

/// Nobody gives up.
#[must_use]
pub fn stay() -> bool {
    false
}

/// The cheapest key derivation there is.
#[must_use]
pub fn cheap() -> KdfWish {
    KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(1000), ..KdfWish::default() }
}

/// What a disk holds of `plain` under this key.
#[must_use]
pub fn encrypted(key: &Secret, unit: u32, plain: &[u8]) -> Vec<u8> {
    let cipher = cipher(key, unit);
    let mut bytes = plain.to_vec();
    cipher.encrypt(DataUnit(0), &mut bytes);
    bytes
}

/// The oracle for the data of these volumes.
fn cipher(key: &Secret, unit: u32) -> Box<dyn SectorCipher> {
    let spec = CipherSpec::parse("aes-xts-plain64").expect("a cipher");
    spec.build(Kernel::Portable, key, unit, 0).expect("built")
}

impl Shape {
    /// The disk of the data.
    #[must_use]
    pub fn data_disk(&self) -> usize {
        usize::from(self.detached)
    }

    /// Bytes of the keyslots area: old keyslots, as many new ones, and the area.
    fn keyslots_bytes(&self) -> u64 {
        2 * self.keyslots as u64 * KEYSLOT + self.area
    }

    /// Its passphrases.
    #[must_use]
    pub fn passphrases(&self) -> Vec<Secret> {
        [ALICE, BOB][..self.keyslots].iter().map(|text| secret(text)).collect()
    }

    /// Does plain data move to make room for a header?
    #[must_use]
    pub fn moves(&self) -> bool {
        self.mode == Mode::Encrypt && !self.detached
    }

    /// Before anything becomes of it.
    ///
    /// # Panics
    /// If the production code does not make it.
    #[must_use]
    pub fn volume(self) -> Volume {
        let plain = noise(self.data, 0x9A1A);
        let options = DiskOptions { sector_bytes: self.sector, alignment: 512, ..DiskOptions::default() };
        if self.mode == Mode::Encrypt {
            let mut data = Image::of(&plain);
            if self.moves() {
                data.set_size(plain.len() as u64 + 2 * SHIFT);
            }
            let mut disks = vec![(data, options)];
            if self.detached {
                disks.insert(HEADER, (Image::zeros(0), options));
            }
            return Volume { shape: self, disks, plain, old: None };
        }
        let header_bytes = METADATA + self.keyslots_bytes();
        let made = self.header(header_bytes);
        let world = World::new(1);
        let size = if self.detached { header_bytes } else { header_bytes + self.data as u64 };
        world.add(Image::zeros(size), options).expect("a disk");
        let mut device = world.blocking(HEADER, "header").expect("a device");
        made.write(&mut device).expect("written");
        if self.keyslots > 1 {
            let opens = engine::volume::keyslots::Proof::Passphrase(secret(ALICE));
            let new = secret(BOB);
            engine::volume::keyslots::add(&mut device, opens, &new, None, &cheap(), &stay).expect("added");
        }
        drop(device);
        let mut image = world.visible(HEADER).expect("an image");
        let data = encrypted(&made.key, self.units[0], &plain);
        let disks = if self.detached {
            vec![(image, options), (Image::of(&data), options)]
        } else {
            image.write(header_bytes, &data);
            vec![(image, options)]
        };
        let salt = match &made.header {
            Header::Luks2(loaded) => loaded.header.metadata.digests[&0].salt.clone(),
            Header::Luks1(_) => panic!("LUKS1"),
        };
        Volume { shape: self, disks, plain, old: Some((made.key, salt)) }
    }

    fn header(&self, header_bytes: u64) -> NewHeader {
        let new = New {
            version: Version::Luks2,
            cipher: None,
            key_bytes: Some(32),
            data_unit: Some(self.units[0]),
            hash: None,
            label: None,
            subsystem: None,
            uuid: None,
            data_offset: (!self.detached).then_some(header_bytes),
            metadata_bytes: None,
            keyslots_bytes: Some(self.keyslots_bytes()),
            kdf: cheap(),
            keyslot: None,
            volume_key_fd: None,
            header: None,
        };
        let place = Place { detached: self.detached, header_capacity: None, data_capacity: None, align: 512 };
        create::make(&new, &place, &secret(ALICE), None).expect("a header")
    }

    /// What is asked of the production code.
    #[must_use]
    pub fn wish(&self) -> proto::reencrypt::Luks {
        let elsewhere = proto::luks::File { fd: 0, name: "header".to_owned() };
        proto::reencrypt::Luks {
            header: self.detached.then_some(elsewhere),
            data_unit: Some(self.units[1]),
            key_bytes: Some(32),
            force_data_unit: true,
            kdf: Some(cheap()),
            reduce_bytes: self.moves().then_some(2 * SHIFT),
            ..proto::reencrypt::Luks::default()
        }
    }
}

impl Volume {
    /// A world with the disks as they are before.
    ///
    /// # Panics
    /// If there is no memory.
    #[must_use]
    pub fn world(&self, seed: u64) -> World {
        let world = World::new(seed);
        for (image, options) in &self.disks {
            world.add(image.clone(), *options).expect("memory for a disk");
        }
        world
    }

    /// Bytes of the data disk.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.disks[self.shape.data_disk()].0.size()
    }
}
