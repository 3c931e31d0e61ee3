//! Which gathers may have cleared what another one finds empty (rule G6).
//!
//! A gather that is open is counted once for each table that it may look into, in the stripe that
//! the table falls into; or, if these may be many, once for everything.
//!
//! ```text
//!  addresses      0 .. 2M   2M .. 4M   4M .. 6M   ..        one last-level table each
//!                    │         │          │
//!  stripes          [7]       [2]        [12]     ..        a cache line each
//!  everywhere     [ whoever looks into more than two tables, unhooks any, or moves pages ]
//! ```
//!
//! - `counts.rs`: the counts;
//! - `reach.rs`: which of them a gather is counted in, and whether another is.
//!
//! What a gather is counted in does not change while it is open. So two loads, one after the other,
//! find every gather that was open before the first of them and is open still.

pub(crate) mod counts;
pub(crate) mod reach;
