//! The loop over the entries of a locked table, and what it is told and tells.

pub(crate) mod zap_loop;
