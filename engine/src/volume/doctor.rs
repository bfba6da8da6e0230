//! A volume explained: what its header says, what is weak or broken in it, who can open it, and why not.
//!
//! | file | what it looks at |
//! |---|---|
//! | `damage` | header copies, what is left where no copy is whole, sizes of the devices |
//! | `settings` | ciphers, key derivations, keyslots |
//! | `progress` | re-encryption |
//! | `rotation` | tokens: where keys live and when they must be replaced |
//! | `passphrase` | conventions that other tools cannot use |
//! | `tools` | who can open it |
//!
//! It only reads, opens no keyslot, and goes as far as a damaged header lets it. Text found on a damaged device is shown only where
//! it is printable ASCII; of a passphrase only what convention it follows.

mod damage;
mod passphrase;
mod progress;
mod rotation;
mod settings;
mod tools;

use proto::luks::{Doctor, Finding, Severity};

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::{ErrorKind, Result};
use crate::volume::keyslots::{GiveUp, stop};
use crate::volume::{Header, store};

/// What is known about the volume beside its header.
#[derive(Debug, Clone, Copy)]
pub struct Patient<'a> {
    /// Bytes of the file or device the header is on.
    pub header_bytes: Option<u64>,
    /// Bytes of the file or device with the data, if it was given.
    pub data_bytes: Option<u64>,
    /// The header is in a file of its own.
    pub is_detached: bool,
    /// A passphrase to look at.
    pub passphrase: Option<&'a Secret>,
    /// Seconds since 1970.
    pub now: u64,
}

/// Findings as they are made.
#[derive(Debug, Default)]
struct Report(Vec<Finding>);

impl Report {
    fn add(
        &mut self,
        severity: Severity,
        about: impl Into<String>,
        message: impl Into<String>,
        advice: &str,
    ) {
        let advice = (!advice.is_empty()).then(|| advice.to_owned());
        self.0.push(Finding { severity, about: about.into(), message: message.into(), advice });
    }

    fn note(&mut self, about: impl Into<String>, message: impl Into<String>, advice: &str) {
        self.add(Severity::Note, about, message, advice);
    }

    fn weak(&mut self, about: impl Into<String>, message: impl Into<String>, advice: &str) {
        self.add(Severity::Weak, about, message, advice);
    }

    fn danger(&mut self, about: impl Into<String>, message: impl Into<String>, advice: &str) {
        self.add(Severity::Danger, about, message, advice);
    }

    /// Worst first; what is equally bad stays in the order it was found in.
    fn sorted(mut self) -> Vec<Finding> {
        self.0.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        self.0
    }
}

/// Explain the volume whose header is on `device`.
///
/// # Errors
/// `Unsupported`: there is no trace of LUKS. `Cancelled`. Else of the device.
pub fn examine(device: &mut Blocking, patient: &Patient<'_>, give_up: GiveUp<'_>) -> Result<Doctor> {
    let mut report = Report::default();
    let convention = patient.passphrase.map(passphrase::Convention::of);
    if let Some(convention) = &convention {
        convention.explain(&mut report);
    }
    // Not for longer: what follows measures key derivations.
    let held = store::lock_device(device, false)?;
    let header = match Header::load(device) {
        Ok(header) => header,
        Err(error) if matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Unsupported) => {
            damage::ruins(device, error, patient.header_bytes, &mut report)?;
            return Ok(Doctor { summary: None, findings: report.sorted(), tools: tools::of_ruins() });
        }
        Err(error) => return Err(error),
    };
    drop(held);
    let mut summary = header.summary();
    damage::copies(&header, &mut report);
    damage::sizes(&header, &summary, patient, &mut report);
    if let Header::Luks2(loaded) = &header {
        progress::explain(&loaded.header.metadata, patient.data_bytes, &mut report);
        rotation::explain(&loaded.header.metadata, patient.now, &mut report);
    }
    settings::explain(&header, &summary, &mut report);
    for keyslot in &mut summary.keyslots {
        stop(give_up)?;
        keyslot.unlock_seconds = settings::unlock_seconds(&header, keyslot.id);
    }
    let tools = tools::judge(&header, &summary, patient.is_detached, convention.as_ref());
    Ok(Doctor { summary: Some(summary), findings: report.sorted(), tools })
}
