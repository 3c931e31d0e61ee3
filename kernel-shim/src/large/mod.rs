//! Pages that come or go many at a time: folios of 16, and the 2 MiB page of zeroes.

mod folio;
pub(crate) mod zero_block;
