//! What notices that something went wrong, and says it.
//!
//! ```text
//!   comes in                          file         goes out
//!   --------                          ----         --------
//!   a frame is given out or freed     ledger       nothing, or what is wrong with it
//!   a word that a program read        stamp        a program's, a free frame's, or neither
//!   something that must never happen  violation    its story, and the end of the run
//!   the command line asks             self_test    a line for each facility of `arch` and `cpu`
//! ```
//!
//! Uses `arch` and `cpu`. The machine and the workloads may use the first three; only
//! `workloads::select` starts the self-test, and only the self-test uses `test_space`
//! and `test_kernel`.

#[expect(unsafe_code, reason = "the words of a frame, found by address")]
pub(crate) mod ledger;
pub(crate) mod self_test;
pub(crate) mod stamp;
#[expect(unsafe_code, reason = "answers for the CPUs to the engine")]
mod test_kernel;
#[expect(unsafe_code, reason = "page tables and addresses made for the test")]
pub(crate) mod test_space;
pub(crate) mod violation;
