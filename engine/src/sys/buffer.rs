//! (interface; replaced by the implementation)
use std::sync::Arc;

#[derive(Debug)]
struct Map;

/// One buffer of an arena; whoever holds it owns its bytes. Move-only.
#[derive(Debug)]
pub struct Buf {
    #[allow(dead_code)]
    map: Arc<Map>,
    index: u32,
}

impl Buf {
    /// Index in its arena, and in the ring's table of registered buffers.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }
}

impl std::ops::Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &[]
    }
}

impl std::ops::DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut []
    }
}
