//! Everything Linux: the only place, with the instruction-set kernels of `crypto`, where `unsafe` is allowed.

pub mod buffer;
