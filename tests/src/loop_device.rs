//! Loop devices, where they can be had.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device over a scratch file; both vanish with it.
#[derive(Debug)]
pub struct LoopDevice {
    device: PathBuf,
    backing: PathBuf,
}

impl LoopDevice {
    /// The device node.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The file under it.
    #[must_use]
    pub fn backing(&self) -> &Path {
        &self.backing
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
        let _ = std::fs::remove_file(&self.backing);
    }
}

/// A zeroed loop device of so many bytes, or `None`, said loudly, where only root may have one and we are not.
#[must_use]
pub fn loop_device(bytes: u64) -> Option<LoopDevice> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let backing = std::env::temp_dir().join(format!("cryptd-loop-{}-{number}", std::process::id()));
    let file = std::fs::File::create(&backing).expect("create the backing file");
    file.set_len(bytes).expect("size the backing file");
    let made = Command::new("losetup").arg("--find").arg("--show").arg(&backing).output();
    match made {
        Ok(output) if output.status.success() => {
            let device = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            Some(LoopDevice { device, backing })
        }
        other => {
            let _ = std::fs::remove_file(&backing);
            crate::skip(&format!("no loop device to be had here: {other:?}"));
            None
        }
    }
}
