//! What the small kernel is put to.

pub(crate) mod churn;
pub(crate) mod lazy;
pub(crate) mod measure;
pub(crate) mod meeting;
pub(crate) mod phases;
pub(crate) mod program;
pub(crate) mod select;
pub(crate) mod stage;
pub(crate) mod threads;
