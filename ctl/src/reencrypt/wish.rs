//! What a volume shall be, on the wire; and options that contradict each other or the format.
//!
//! An option that is silently ignored would be a volume made otherwise than was asked for.

use proto::luks::File;
use proto::reencrypt::{Format, Luks, RawPair};
use proto::{Raw, TweakKind};

use crate::args::{FoundFormat, Iv};
use crate::luks::new;
use crate::reencrypt::args::{Reencrypt, Resilience};
use crate::report::{Error, Result};
use crate::volume::{raw, refuse_luks_options, refuse_raw_options};

/// The format, with its descriptors still to be filled in.
pub fn format(args: &Reencrypt) -> Result<Format> {
    let volume = &args.volume_args;
    if volume.format == FoundFormat::Raw {
        let old = raw(&args.raw, volume.key_size.as_deref(), volume.sector_size.as_deref());
        let new = new_raw(args, &old);
        let journal = File { fd: 0, name: String::new() };
        return Ok(Format::Raw(Box::new(RawPair { old, new, journal })));
    }
    let kdf_typed = args.kdf.hash.is_some() || args.kdf.kdf.is_typed();
    Ok(Format::Luks(Box::new(Luks {
        header: None,
        commit: None,
        drop_slots: volume.drop_slots,
        cipher: volume.cipher.clone(),
        key_bytes: number(volume.key_size.as_deref()).map(|bits| bits / 8),
        data_unit: number(volume.sector_size.as_deref()),
        force_data_unit: volume.sector_size_may_break_filesystem,
        kdf: kdf_typed.then(|| new::keyslot(&args.kdf)).transpose()?,
        reduce_bytes: args.becoming.reduce_device_size,
        label: args.becoming.label.clone(),
        uuid: args.becoming.uuid.clone(),
    })))
}

fn number(text: Option<&str>) -> Option<u32> {
    text.map(|text| text.parse().expect("clap allows only the listed numbers"))
}

fn new_raw(args: &Reencrypt, old: &Raw) -> Raw {
    let new = &args.new_raw;
    Raw {
        key_bytes: number(new.new_key_size.as_deref()).map_or(old.key_bytes, |bits| bits / 8),
        data_unit: number(new.new_sector_size.as_deref()).unwrap_or(old.data_unit),
        tweak: new.new_iv.map_or(old.tweak, |iv| match iv {
            Iv::Plain64 => TweakKind::Plain64,
            Iv::Plain => TweakKind::Plain,
        }),
        large_tweak: new.new_iv_large_sectors.unwrap_or(old.large_tweak),
        tweak_offset: new.new_iv_offset.unwrap_or(old.tweak_offset),
    }
}

/// Refuse what cannot be meant together.
pub fn refuse_contradictions(args: &Reencrypt) -> Result<()> {
    if args.volume_args.format == FoundFormat::Raw {
        refuse_luks_options(&luks_only(args))?;
        if args.volume_args.journal.is_none() {
            return Err(Error::usage("--format raw needs --journal: where is the progress to be kept?")
                .hint("name a new file, on a disk; it is needed until all is done"));
        }
    } else {
        refuse_raw_options(&args.raw)?;
        if let Some((option, _)) = raw_only(args).iter().find(|(_, typed)| *typed) {
            return Err(Error::usage(format!("{option} is an option of --format raw"))
                .hint("a LUKS volume has all of it in its header; leave it out"));
        }
    }
    sector_sizes(args)?;
    if args.becoming.decrypt {
        refuse_with("--decrypt", &new_key_options(args))?;
        if args.volume_args.header.is_none() {
            return Err(Error::usage("--decrypt needs --header: the header must be detached").hint(
                "with the header in front of the data, `cryptctl decrypt` copies the data to another place",
            ));
        }
    }
    if args.becoming.encrypt {
        refuse_with("--encrypt", &[("--drop-slots", args.volume_args.drop_slots)])?;
    }
    if args.resume_only {
        let begun = new_key_options(args).into_iter().filter(|(option, _)| *option != "--new-key");
        let begun: Vec<_> = begun.chain([("--resilience", args.safety.resilience.is_some())]).collect();
        if let Some((option, _)) = begun.iter().find(|(_, typed)| *typed) {
            return Err(Error::usage(format!("{option}: what was begun goes on as it was begun"))
                .hint(format!("leave {option} out with --resume-only")));
        }
    }
    resilience(args)
}

/// A larger data unit may be more than a filesystem's block. Of a LUKS volume the daemon knows the old one.
fn sector_sizes(args: &Reencrypt) -> Result<()> {
    let volume = &args.volume_args;
    let raw = volume.format == FoundFormat::Raw;
    let (option, typed) = if raw {
        ("--new-sector-size", &args.new_raw.new_sector_size)
    } else {
        ("--sector-size", &volume.sector_size)
    };
    let accepted = volume.sector_size_may_break_filesystem;
    if accepted && typed.is_none() {
        let what = format!("--sector-size-may-break-filesystem belongs to {option}");
        return Err(Error::usage(what).hint("leave it out"));
    }
    let old = number(volume.sector_size.as_deref()).unwrap_or(512);
    if raw && !accepted && !args.resume_only && number(typed.as_deref()).is_some_and(|new| new > old) {
        return Err(Error::usage(format!(
            "--new-sector-size is larger than {old}: a filesystem with smaller blocks could not be mounted any more"
        ))
        .hint("--sector-size-may-break-filesystem accepts that"));
    }
    Ok(())
}

fn resilience(args: &Reencrypt) -> Result<()> {
    let accepted = args.safety.crash_may_destroy_data;
    let shift = args.becoming.reduce_device_size.is_some();
    match args.safety.resilience {
        Some(Resilience::None) if !accepted => {
            Err(Error::usage("--resilience none: a crash or a power cut would destroy data")
                .hint("--crash-may-destroy-data accepts that; checksum costs little and loses nothing"))
        }
        Some(Resilience::Datashift) if !shift => {
            Err(Error::usage("--resilience datashift: nothing moves without --reduce-device-size")
                .hint("leave it out, or use checksum or journal"))
        }
        Some(Resilience::None) => Ok(()),
        _ if accepted => Err(Error::usage("--crash-may-destroy-data belongs to --resilience none")),
        _ => Ok(()),
    }
}

fn refuse_with(mode: &str, options: &[(&str, bool)]) -> Result<()> {
    match options.iter().find(|(_, typed)| *typed) {
        Some((option, _)) => {
            Err(Error::usage(format!("{option} means nothing with {mode}"))
                .hint(format!("leave out {option}")))
        }
        None => Ok(()),
    }
}

/// What is said about a new volume key.
fn new_key_options(args: &Reencrypt) -> Vec<(&'static str, bool)> {
    let volume = &args.volume_args;
    let luks = volume.format == FoundFormat::Luks;
    vec![
        ("--new-key", args.new_key.is_some()),
        ("--cipher", volume.cipher.is_some()),
        ("--key-size", luks && volume.key_size.is_some()),
        ("--sector-size", luks && volume.sector_size.is_some()),
        ("--drop-slots", volume.drop_slots),
        ("--reduce-device-size", args.becoming.reduce_device_size.is_some()),
        ("--label", args.becoming.label.is_some()),
        ("--uuid", args.becoming.uuid.is_some()),
        ("--hash", args.kdf.hash.is_some()),
        ("--pbkdf", args.kdf.kdf.pbkdf.is_some()),
        ("--iter-time", args.kdf.kdf.iter_time.is_some()),
        ("--pbkdf-force-iterations", args.kdf.kdf.pbkdf_force_iterations.is_some()),
        ("--pbkdf-memory", args.kdf.kdf.pbkdf_memory.is_some()),
        ("--pbkdf-parallel", args.kdf.kdf.pbkdf_parallel.is_some()),
    ]
}

fn luks_only(args: &Reencrypt) -> Vec<(&'static str, bool)> {
    let mut options = new_key_options(args);
    options.retain(|(option, _)| *option != "--new-key");
    options.extend([
        ("--header", args.volume_args.header.is_some()),
        ("--encrypt", args.becoming.encrypt),
        ("--decrypt", args.becoming.decrypt),
    ]);
    options
}

fn raw_only(args: &Reencrypt) -> [(&'static str, bool); 6] {
    let new = &args.new_raw;
    [
        ("--journal", args.volume_args.journal.is_some()),
        ("--new-key-size", new.new_key_size.is_some()),
        ("--new-sector-size", new.new_sector_size.is_some()),
        ("--new-iv", new.new_iv.is_some()),
        ("--new-iv-large-sectors", new.new_iv_large_sectors.is_some()),
        ("--new-iv-offset", new.new_iv_offset.is_some()),
    ]
}
