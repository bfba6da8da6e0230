//! Everything Linux: the only place, with the instruction-set kernels of `crypto`, where `unsafe` is allowed.

pub mod affinity;
pub mod buffer;
pub mod fsuid;
pub mod lock;
pub mod op;
pub mod process;
pub mod ring;
