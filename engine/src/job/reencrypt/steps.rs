//! The loop over hotzones: which barrier moves when.
