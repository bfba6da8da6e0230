//! The encrypted side of a job: what was typed about its format, its header and its keys.
//!
//! Three kinds: a new LUKS volume (`encrypt`), an existing one (`decrypt`, `verify`), and `raw`, which has no header. An
//! option of one kind is refused with another: an option that is silently ignored would be a volume made otherwise than
//! was asked for.

use std::path::PathBuf;

use proto::{Format, Raw, TweakKind, luks};

use crate::args::{FormatName, FoundFormat, Iv, NewVolumeArgs, RawArgs, VolumeArgs};
use crate::luks::args::{NewArgs, Version};
use crate::luks::new;
use crate::report::{Error, Result};
use crate::secret::{self, KeyRef, Purpose, Secret, VOLUME_KEY_BYTES};

/// A format, and where its secrets are.
pub struct Wanted {
    /// For the wire; descriptors are filled in later.
    pub format: Format,
    key: Option<(KeyRef, &'static str)>,
    /// A new volume's own volume key.
    volume_key: Option<KeyRef>,
    /// A detached header.
    pub header: Option<PathBuf>,
}

/// The secrets of a volume, at hand.
pub struct Keys {
    /// What [`proto::Volume::key_fd`] means.
    pub key: Secret,
    /// What [`luks::New::volume_key_fd`] means.
    pub volume_key: Option<Secret>,
}

/// `encrypt`: a volume to be made.
pub fn to_make(args: &NewVolumeArgs) -> Result<Wanted> {
    let version = match args.format {
        FormatName::Luks1 => Version::Luks1,
        FormatName::Luks2 => Version::Luks2,
        FormatName::Raw => return raw_to_make(args),
    };
    refuse_raw_options(&args.raw)?;
    Ok(Wanted {
        format: Format::NewLuks(Box::new(new::header(&args.new, version)?)),
        key: Some((args.key.parse("--key")?, "--key")),
        volume_key: args.new.volume_key.as_ref().map(|key| key.parse("--volume-key")).transpose()?,
        header: args.new.header.clone(),
    })
}

/// `encrypt --update`: a volume there is, whose key alone is asked for.
pub fn to_update(args: &NewVolumeArgs) -> Result<Wanted> {
    let new = &args.new;
    if args.format == FormatName::Raw {
        return raw_to_make(args);
    }
    refuse_raw_options(&args.raw)?;
    let made = ["--header", "--key-slot"];
    let of_new = luks_options(new)
        .into_iter()
        .filter(|(option, _)| !made.contains(option))
        .chain([("--key-size", new.key_size.is_some()), ("--sector-size", new.sector_size.is_some())]);
    if let Some((option, _)) = of_new.into_iter().find(|(_, typed)| *typed) {
        let what = format!("{option} is of a new volume, and --update writes into the one there is");
        return Err(Error::usage(what).hint("leave it out: the header of DST tells"));
    }
    Ok(Wanted {
        format: Format::Luks(luks::Open {
            header: None,
            keyslot: new.key_slot,
            secret: luks::Secret::Passphrase,
        }),
        key: Some((args.key.parse("--key")?, "--key")),
        volume_key: None,
        header: new.header.clone(),
    })
}

/// What is said of a new LUKS volume alone, and whether it was typed.
fn luks_options(new: &NewArgs) -> [(&'static str, bool); 16] {
    [
        ("--header", new.header.is_some()),
        ("--volume-key", new.volume_key.is_some()),
        ("--cipher", new.cipher.is_some()),
        ("--hash", new.hash.is_some()),
        ("--data-offset", new.data_offset.is_some()),
        ("--label", new.label.is_some()),
        ("--subsystem", new.subsystem.is_some()),
        ("--uuid", new.uuid.is_some()),
        ("--key-slot", new.key_slot.is_some()),
        ("--luks2-metadata-size", new.luks2_metadata_size.is_some()),
        ("--luks2-keyslots-size", new.luks2_keyslots_size.is_some()),
        ("--pbkdf", new.kdf.pbkdf.is_some()),
        ("--iter-time", new.kdf.iter_time.is_some()),
        ("--pbkdf-force-iterations", new.kdf.pbkdf_force_iterations.is_some()),
        ("--pbkdf-memory", new.kdf.pbkdf_memory.is_some()),
        ("--pbkdf-parallel", new.kdf.pbkdf_parallel.is_some()),
    ]
}

fn raw_to_make(args: &NewVolumeArgs) -> Result<Wanted> {
    let new = &args.new;
    refuse_luks_options(&luks_options(new))?;
    Ok(Wanted {
        format: Format::Raw(raw(&args.raw, new.key_size.as_deref(), new.sector_size.as_deref())),
        key: Some((args.key.parse("--key")?, "--key")),
        volume_key: None,
        header: None,
    })
}

/// `decrypt`, `verify`: a volume there is. Which version of LUKS it is, only its header tells.
pub fn to_open(args: &VolumeArgs) -> Result<Wanted> {
    if args.format == FoundFormat::Raw {
        let luks_only = [
            ("--header", args.header.is_some()),
            ("--volume-key", args.volume_key.is_some()),
            ("--key-slot", args.key_slot.is_some()),
        ];
        refuse_luks_options(&luks_only)?;
    } else {
        refuse_raw_options(&args.raw)?;
        let raw_only =
            [("--key-size", args.key_size.is_some()), ("--sector-size", args.sector_size.is_some())];
        if let Some((option, _)) = raw_only.iter().find(|(_, typed)| *typed) {
            return Err(raw_only_option(option).hint("a LUKS header tells it; leave it out"));
        }
    }
    let (key, secret) = match (&args.key, &args.volume_key) {
        (_, Some(key)) => ((key.parse("--volume-key")?, "--volume-key"), luks::Secret::VolumeKey),
        (Some(key), None) => ((key.parse("--key")?, "--key"), luks::Secret::Passphrase),
        (None, None) => return Err(Error::usage("--key is missing")),
    };
    let format = if args.format == FoundFormat::Raw {
        Format::Raw(raw(&args.raw, args.key_size.as_deref(), args.sector_size.as_deref()))
    } else {
        Format::Luks(luks::Open { header: None, keyslot: args.key_slot, secret })
    };
    Ok(Wanted { format, key: Some(key), volume_key: None, header: args.header.clone() })
}

/// A headerless volume; what is absent has dm-crypt's default.
pub fn raw(args: &RawArgs, key_size: Option<&str>, sector_size: Option<&str>) -> Raw {
    let number = |text: Option<&str>| {
        text.map_or(512, |text| text.parse::<u32>().expect("clap allows only the listed numbers"))
    };
    Raw {
        key_bytes: number(key_size) / 8,
        data_unit: number(sector_size),
        tweak: match args.iv {
            None | Some(Iv::Plain64) => TweakKind::Plain64,
            Some(Iv::Plain) => TweakKind::Plain,
        },
        large_tweak: args.iv_large_sectors,
        tweak_offset: args.iv_offset.unwrap_or(0),
    }
}

/// Refuse options of raw with LUKS.
pub fn refuse_raw_options(raw: &RawArgs) -> Result<()> {
    let typed = [
        ("--iv", raw.iv.is_some()),
        ("--iv-large-sectors", raw.iv_large_sectors),
        ("--iv-offset", raw.iv_offset.is_some()),
    ];
    match typed.iter().find(|(_, typed)| *typed) {
        Some((option, _)) => {
            Err(raw_only_option(option).hint("LUKS has its own rule for tweaks; leave it out"))
        }
        None => Ok(()),
    }
}

fn raw_only_option(option: &str) -> Error {
    Error::usage(format!("{option} is an option of --format raw"))
}

/// Refuse options of LUKS, each with whether it was typed, with raw.
pub fn refuse_luks_options(options: &[(&str, bool)]) -> Result<()> {
    match options.iter().find(|(_, typed)| *typed) {
        Some((option, _)) => {
            Err(Error::usage(format!("{option} is an option of LUKS: raw has no header and no keyslots"))
                .hint("leave it out, or leave out --format raw"))
        }
        None => Ok(()),
    }
}

impl Wanted {
    /// Does fetching its secrets consume standard input?
    pub fn reads_stdin(&self) -> bool {
        self.keys().any(KeyRef::reads_stdin)
    }

    fn keys(&self) -> impl Iterator<Item = &KeyRef> {
        self.key.iter().map(|(at, _)| at).chain(&self.volume_key)
    }

    /// Two secrets cannot be read from one descriptor: the first takes it all.
    pub fn refuse_shared_descriptor(&self) -> Result<()> {
        secret::refuse_shared(&self.keys().collect::<Vec<_>>())
    }

    /// Fetch the secrets. `name`: the volume's, for prompts. `twice`: a prompt for a raw volume's key asks again.
    pub fn fetch(&mut self, name: &str, twice: bool) -> Result<Keys> {
        let (at, option) = self.key.take().expect("every format has a key");
        let mut volume_key = None;
        let key = match &self.format {
            Format::Raw(raw) => {
                let size = usize::try_from(raw.key_bytes).expect("32 or 64");
                secret::volume_key(&at, option, &[size], twice)?
            }
            Format::Luks(open) if open.secret == luks::Secret::VolumeKey => {
                secret::volume_key(&at, option, &VOLUME_KEY_BYTES, false)?
            }
            Format::Luks(_) => secret::passphrase(&at, option, Purpose::Open(name))?,
            Format::NewLuks(new) => {
                let passphrase = secret::passphrase(&at, option, Purpose::New(name))?;
                if let Some(at) = &self.volume_key {
                    let size = new::key_bytes(new);
                    volume_key = Some(secret::volume_key(at, "--volume-key", &[size], true)?);
                }
                passphrase
            }
        };
        Ok(Keys { key, volume_key })
    }
}
