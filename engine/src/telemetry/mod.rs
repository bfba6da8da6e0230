//! Counting without disturbing: recorders owned by one worker each, merged only when asked.

pub mod record;
