//! Locks of this kernel: of address spaces, which say what is done under them, and of tables, at
//! whose drop others may run.
//!
//! The calls take the map lock by `Mm`; the engine takes a table's by `TableMemory`.

pub(crate) mod map_lock;
pub(crate) mod seam_lock;
