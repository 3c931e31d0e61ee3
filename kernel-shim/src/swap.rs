//! Places in swap: which are in use, and by how many entries.

use alloc::vec::Vec;

use spin::RelaxStrategy;
use spin::mutex::SpinMutex;

/// All places of the one swap device.
#[derive(Debug)]
pub(crate) struct Swap<R>(SpinMutex<Places, R>);

#[derive(Debug)]
struct Places {
    /// By number.
    places: Vec<InUse>,
    /// Those that are not in use. The one that was given back last is taken first: a place that is
    /// given back too early is in other hands at once.
    free: Vec<u64>,
    /// Entries that name a place, over all of them.
    nr_entries: i64,
}

#[derive(Clone, Copy, Debug)]
struct InUse {
    /// Entries that name it.
    entries: u32,
    content: Content,
}

/// Whether what a place is taken for has been written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// The page is still in memory, and programs may still write to it: whoever faults waits.
    OnItsWay,
    Written,
}

impl<R: RelaxStrategy> Swap<R> {
    pub(crate) const fn new() -> Self {
        Self(SpinMutex::new(Places { places: Vec::new(), free: Vec::new(), nr_entries: 0 }))
    }

    /// Takes a place for one entry. Nothing is read from it before [`written`](Self::written).
    pub(crate) fn take(&self) -> u64 {
        let mut places = self.0.lock();
        places.nr_entries += 1;
        let new = InUse { entries: 1, content: Content::OnItsWay };
        if let Some(slot) = places.free.pop() {
            if let Some(place) = places.get(slot) {
                *place = new;
            }
            return slot;
        }
        places.places.push(new);
        places.places.len() as u64 - 1
    }

    /// The page is at the place now.
    pub(crate) fn written(&self, slot: u64) {
        let mut places = self.0.lock();
        let Some(place) = places.get(slot) else { return };
        place.content = Content::Written;
        if place.entries == 0 {
            places.free.push(slot);
        }
    }

    /// Whether what is to be there is there.
    pub(crate) fn is_written(&self, slot: u64) -> bool {
        self.0.lock().get(slot).is_some_and(|place| place.content == Content::Written)
    }

    /// One entry more names the place.
    pub(crate) fn add_entry(&self, slot: u64) {
        let mut places = self.0.lock();
        places.nr_entries += 1;
        if let Some(place) = places.get(slot) {
            place.entries += 1;
        }
    }

    /// One entry less names the place; with the last one it is free, once it is written.
    pub(crate) fn drop_entry(&self, slot: u64) {
        let mut places = self.0.lock();
        places.nr_entries -= 1;
        let Some(place) = places.get(slot) else { return };
        place.entries = place.entries.saturating_sub(1);
        if place.entries == 0 && place.content == Content::Written {
            places.free.push(slot);
        }
    }

    /// Entries that name a place now.
    pub(crate) fn nr_entries(&self) -> i64 {
        self.0.lock().nr_entries
    }

    /// How many entries name this place.
    pub(crate) fn entries_of(&self, slot: u64) -> u32 {
        self.0.lock().get(slot).map_or(0, |place| place.entries)
    }

    /// Places in use.
    pub(crate) fn nr_in_use(&self) -> u64 {
        let places = self.0.lock();
        (places.places.len() - places.free.len()) as u64
    }
}

impl Places {
    fn get(&mut self, slot: u64) -> Option<&mut InUse> {
        self.places.get_mut(usize::try_from(slot).ok()?)
    }
}
