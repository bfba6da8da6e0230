//! Re-encryption in place as a job.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | from the request to the end |
//! | `alone` | one re-encryption per volume |
//! | `course` | from an opened re-encryption to what the workers carry |
//! | `hotzone` | which chunks are here, and the next hotzone of them |
//! | `steps` | the loop over hotzones: which barrier moves when |
//! | `proof` | digests of the plaintext before and after |
//! | `dry` | what it would do, and how long it would take |

pub mod alone;
pub mod course;
pub mod dry;
pub mod hotzone;
pub mod proof;
pub mod steps;
