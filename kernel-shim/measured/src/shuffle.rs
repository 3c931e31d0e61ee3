//! An order that is random, and the same in every run.

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

/// Every run of every bench sees the same layouts.
const SEED: u64 = 0x6d6d_755f_6761_7468;

/// Shuffles the same way every time.
pub fn shuffle<T>(items: &mut [T]) {
    items.shuffle(&mut random());
}

/// Numbers that are the same in every run.
pub(crate) fn random() -> SmallRng {
    SmallRng::seed_from_u64(SEED)
}
