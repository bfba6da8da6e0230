//! What the tests share.

mod loop_device;

pub use loop_device::{LoopDevice, loop_device};
