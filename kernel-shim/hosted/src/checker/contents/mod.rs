//! What programs read: what they have written, and nothing else.
//!
//! A page has no bytes here. Two words stand for all that is in it, one for each half: programs
//! write words that nobody has written before, and the kernel fills, copies and swaps whole pages,
//! by calls of the machine.
//!
//! ```text
//!  words    what each frame holds, and each place on a disk       what the kernel does to it
//!  truth    what each program is to read, page by page            what the kernel says: `Contents`
//!           and what programs write
//!  checks   the one against the other, at each access and at rest
//! ```
//!
//! A kernel that says nothing of its areas ([`Contents`](crate::Contents)) is not checked, nor is a
//! machine of more than 4 GiB.

mod checks;
mod kept;
mod truth;
mod words;

pub(crate) use kept::Kept;
