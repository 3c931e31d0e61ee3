//! What notices that something went wrong: the ledger of frames, stamps, the self-test.

#[expect(unsafe_code, reason = "the words of a frame, found by address")]
pub(crate) mod ledger;
pub(crate) mod self_test;
pub(crate) mod stamp;
#[expect(unsafe_code, reason = "page tables and addresses made for the test")]
pub(crate) mod test_space;
pub(crate) mod violation;
