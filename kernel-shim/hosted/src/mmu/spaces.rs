//! All that one CPU caches, by PCID: which frames it can reach, and what the watcher is told.

use rustc_hash::FxHashMap;
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

use crate::mmu::arch::{LinearAddress, PageSize};
use crate::mmu::features::Capacity;
use crate::mmu::structure_cache::{StructureCache, StructureEntry};
use crate::mmu::tlb_cache::{Clash, Inserted, TlbCache, TlbEntry};
use crate::mmu::watch::{CachedEntry, FrameWatch, Held, Tag, Use};
use crate::vocabulary::Moment;

/// Which of the TLBs of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// That of loads and stores; of everything, where there is one.
    Data,
    /// That of instruction fetches, where there are two.
    Fetch,
}

/// Everything cached under one tag.
#[derive(Debug)]
pub(crate) struct Space {
    tag: Tag,
    tlb: TlbCache,
    /// What instruction fetches use, where that is not the same: [`Side::Fetch`].
    fetch: TlbCache,
    structures: StructureCache,
    named: NamedFrames,
    /// Addresses that were seen to be served by more than one page size, and may still be.
    mixed: Vec<LinearAddress>,
}

impl Space {
    fn new(tag: Tag) -> Self {
        Self {
            tag,
            tlb: TlbCache::default(),
            fetch: TlbCache::default(),
            structures: StructureCache::default(),
            named: NamedFrames::default(),
            mixed: Vec::new(),
        }
    }

    /// An address that is served by more than one page size now, if any is that was not told yet:
    /// the larger and the smaller page.
    pub(crate) fn mixed(&mut self) -> Option<(LinearAddress, TlbEntry, TlbEntry)> {
        while let Some(address) = self.mixed.pop() {
            let mixed = self.tlb.mixed_at(address).or_else(|| self.fetch.mixed_at(address));
            if let Some((large, small)) = mixed {
                return Some((address, large, small));
            }
        }
        None
    }

    /// A page of `size` was cached for `address`.
    #[inline]
    fn look_for_a_mix(&mut self, side: Side, address: LinearAddress, size: PageSize) {
        let tlb = self.tlb(side);
        let mixed = match size {
            PageSize::Size4KiB => tlb.mixed_at(address).map(|_| address),
            PageSize::Size2MiB | PageSize::Size1GiB => tlb.mixed_in(address, size),
        };
        // One is enough to be told; the rest of the same page would be told again and again.
        if let Some(mixed) = mixed
            && self.mixed.len() < 16
        {
            self.mixed.push(mixed);
        }
    }

    pub(crate) fn tag(&self) -> Tag {
        self.tag
    }

    #[inline]
    pub(crate) fn tlb(&self, side: Side) -> &TlbCache {
        match side {
            Side::Data => &self.tlb,
            Side::Fetch => &self.fetch,
        }
    }

    #[inline]
    fn tlb_mut(&mut self, side: Side) -> &mut TlbCache {
        match side {
            Side::Data => &mut self.tlb,
            Side::Fetch => &mut self.fetch,
        }
    }

    /// Number of translations, on both sides.
    fn tlb_len(&self) -> usize {
        self.tlb.len() + self.fetch.len()
    }

    pub(crate) fn structures(&self) -> &StructureCache {
        &self.structures
    }

    /// Whether an entry of this space names `frame`, alone or as part of a large page.
    pub(crate) fn names(&self, frame: PhysFrame) -> bool {
        self.named.contains(frame.start_address())
    }

    #[inline]
    pub(crate) fn drop_page<W: FrameWatch>(&mut self, address: LinearAddress, watch: &mut W) {
        let Self { tag, tlb, fetch, named, .. } = self;
        tlb.drop_page(address, |entry| release_page(*tag, named, entry, watch));
        fetch.drop_page(address, |entry| release_page(*tag, named, entry, watch));
    }

    #[inline]
    pub(crate) fn drop_path<W: FrameWatch>(&mut self, address: LinearAddress, watch: &mut W) {
        let Self { tag, structures, named, .. } = self;
        structures.drop_path(address, |entry| release_table(*tag, named, entry, watch));
    }

    #[inline]
    pub(crate) fn drop_pages<W: FrameWatch>(&mut self, watch: &mut W) {
        let Self { tag, tlb, fetch, named, structures, .. } = self;
        let both = [tlb, fetch];
        if structures.is_empty() {
            named.clear();
            for tlb in both {
                tlb.drop_all(|entry| watch.release(first_frame(entry.start()), page(*tag, entry)));
            }
        } else {
            for tlb in both {
                tlb.drop_all(|entry| release_page(*tag, named, entry, watch));
            }
        }
    }

    #[inline]
    pub(crate) fn drop_structures<W: FrameWatch>(&mut self, watch: &mut W) {
        let Self { tag, structures, named, .. } = self;
        structures.drop_all(|entry| release_table(*tag, named, entry, watch));
    }

    pub(crate) fn drop_all<W: FrameWatch>(&mut self, watch: &mut W) {
        self.drop_structures(watch);
        self.drop_pages(watch);
    }

    /// Everything in this space, in the form for people.
    pub(crate) fn entries(&self) -> impl Iterator<Item = CachedEntry> + '_ {
        let pages = self.tlb.iter().chain(self.fetch.iter()).map(|(address, entry, at)| CachedEntry {
            held: page(self.tag, entry),
            address,
            span_shift: entry.size().shift(),
            frame: first_frame(entry.start()),
            rights: entry.rights(),
            dirty: entry.dirty(),
            at,
        });
        let tables = self.structures.iter().map(|(address, entry)| CachedEntry {
            held: table(self.tag, entry),
            address,
            span_shift: entry.level().entry_shift(),
            frame: first_frame(entry.table()),
            rights: entry.rights(),
            dirty: false,
            at: Moment::START,
        });
        pages.chain(tables)
    }
}

fn release_page<W: FrameWatch>(tag: Tag, named: &mut NamedFrames, entry: TlbEntry, watch: &mut W) {
    named.remove(entry.start(), entry.size());
    watch.release(first_frame(entry.start()), page(tag, entry));
}

fn release_table<W: FrameWatch>(tag: Tag, named: &mut NamedFrames, entry: StructureEntry, watch: &mut W) {
    named.remove(entry.table(), PageSize::Size4KiB);
    watch.release(first_frame(entry.table()), table(tag, entry));
}

fn page(tag: Tag, entry: TlbEntry) -> Held {
    Held { as_a: Use::Page(entry.size()), tag }
}

fn table(tag: Tag, entry: StructureEntry) -> Held {
    Held { as_a: Use::Table(entry.table_level()), tag }
}

fn first_frame(start: PhysAddr) -> PhysFrame {
    PhysFrame::containing_address(start)
}

/// How many entries of a space name each frame, so that "can this CPU reach it" needs no scan.
#[derive(Debug, Default)]
struct NamedFrames {
    count: FxHashMap<u64, u32>,
    /// Entries among them that name more than 4 KiB.
    large: usize,
}

impl NamedFrames {
    #[inline]
    fn add(&mut self, start: PhysAddr, size: PageSize) {
        self.large += usize::from(size != PageSize::Size4KiB);
        *self.count.entry(Self::key(start, size)).or_insert(0) += 1;
    }

    #[inline]
    fn remove(&mut self, start: PhysAddr, size: PageSize) {
        self.large -= usize::from(size != PageSize::Size4KiB);
        let std::collections::hash_map::Entry::Occupied(mut count) = self.count.entry(Self::key(start, size))
        else {
            debug_assert!(false, "an entry names {start:?} that was never counted");
            return;
        };
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
    }

    fn clear(&mut self) {
        let count = self.count.len();
        self.count.clear();
        if self.count.capacity() > 16 * count + 256 {
            self.count.shrink_to(4 * count);
        }
        self.large = 0;
    }

    fn contains(&self, address: PhysAddr) -> bool {
        let sizes = if self.large == 0 { &PageSize::ALL[..1] } else { &PageSize::ALL[..] };
        sizes.iter().any(|&size| self.count.contains_key(&Self::key(address, size)))
    }

    /// Number of the block of `size`, with the size in the two lowest bits.
    const fn key(address: PhysAddr, size: PageSize) -> u64 {
        ((address.as_u64() >> size.shift()) << 2) | size as u64
    }
}

/// Place of a space among those of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SpaceIndex(usize);

impl SpaceIndex {
    /// The space of global TLB entries.
    pub(crate) const GLOBAL: Self = Self(0);
}

/// The spaces of one CPU: the global one, and one for each PCID it has ever loaded.
#[derive(Debug)]
pub(crate) struct Spaces {
    spaces: Vec<Space>,
    by_pcid: FxHashMap<u16, SpaceIndex>,
    tlb_capacity: Capacity,
    structure_capacity: Capacity,
    /// State of the generator that picks what a full cache displaces. Fixed at the start, so runs
    /// repeat.
    dice: u64,
}

impl Spaces {
    pub(crate) fn new(tlb_capacity: Capacity, structure_capacity: Capacity) -> Self {
        Self {
            spaces: vec![Space::new(Tag::Global)],
            by_pcid: FxHashMap::default(),
            tlb_capacity,
            structure_capacity,
            dice: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// The space of `pcid`, made if this CPU never loaded it.
    pub(crate) fn open(&mut self, pcid: Pcid) -> SpaceIndex {
        *self.by_pcid.entry(pcid.value()).or_insert_with(|| {
            self.spaces.push(Space::new(Tag::Pcid(pcid)));
            SpaceIndex(self.spaces.len() - 1)
        })
    }

    /// The space of `pcid`, if this CPU ever loaded it.
    pub(crate) fn find(&self, pcid: Pcid) -> Option<SpaceIndex> {
        self.by_pcid.get(&pcid.value()).copied()
    }

    #[inline]
    pub(crate) fn at(&self, index: SpaceIndex) -> &Space {
        &self.spaces[index.0]
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, index: SpaceIndex) -> &mut Space {
        &mut self.spaces[index.0]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Space> {
        self.spaces.iter()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Space> {
        self.spaces.iter_mut()
    }

    pub(crate) fn tlb_len(&self) -> usize {
        self.spaces.iter().map(Space::tlb_len).sum()
    }

    pub(crate) fn structures_len(&self) -> usize {
        self.spaces.iter().map(|space| space.structures.len()).sum()
    }

    /// Caches a translation; one displaced by it, or by the lack of room, is released.
    #[inline]
    pub(crate) fn insert_page<W: FrameWatch>(
        &mut self,
        (index, side): (SpaceIndex, Side),
        address: LinearAddress,
        entry: TlbEntry,
        clash: Clash,
        watch: &mut W,
    ) {
        if let Capacity::AtMost(most) = self.tlb_capacity
            && self.at(index).tlb(side).get(address, entry.size()).is_none()
            && !self.make_room(most, Self::tlb_len, Self::drop_nth_page, watch)
        {
            return;
        }
        let space = self.at_mut(index);
        match space.tlb_mut(side).insert(address, entry, clash, watch.now()) {
            Inserted::Kept => return,
            Inserted::Added => space.look_for_a_mix(side, address, entry.origin()),
            Inserted::Replaced(old) => release_page(space.tag, &mut space.named, old, watch),
        }
        space.named.add(entry.start(), entry.size());
        watch.hold(first_frame(entry.start()), page(space.tag, entry));
    }

    /// Caches an entry that references a table, unless one is there.
    #[inline]
    pub(crate) fn insert_structure<W: FrameWatch>(
        &mut self,
        index: SpaceIndex,
        address: LinearAddress,
        entry: StructureEntry,
        watch: &mut W,
    ) {
        if let Capacity::AtMost(most) = self.structure_capacity
            && self.at(index).structures.get(address, entry.level()).is_none()
            && !self.make_room(most, Self::structures_len, Self::drop_nth_structure, watch)
        {
            return;
        }
        let space = self.at_mut(index);
        if space.structures.insert(address, entry) {
            space.named.add(entry.table(), PageSize::Size4KiB);
            watch.hold(first_frame(entry.table()), table(space.tag, entry));
        }
    }

    /// Drops the `place`th TLB entry of all.
    pub(crate) fn drop_nth_page<W: FrameWatch>(&mut self, mut place: usize, watch: &mut W) {
        for space in &mut self.spaces {
            for side in [Side::Data, Side::Fetch] {
                let here = space.tlb(side).len();
                if place >= here {
                    place -= here;
                } else if let Some(entry) = space.tlb_mut(side).drop_nth(place) {
                    release_page(space.tag, &mut space.named, entry, watch);
                    return;
                }
            }
        }
    }

    /// Drops the `place`th structure-cache entry of all.
    pub(crate) fn drop_nth_structure<W: FrameWatch>(&mut self, mut place: usize, watch: &mut W) {
        for space in &mut self.spaces {
            let here = space.structures.len();
            if place >= here {
                place -= here;
            } else if let Some(entry) = space.structures.drop_nth(place) {
                release_table(space.tag, &mut space.named, entry, watch);
                return;
            }
        }
    }

    /// Drops entries until one more fits into `most`; says whether any fit at all.
    fn make_room<W: FrameWatch>(
        &mut self,
        most: usize,
        count: impl Fn(&Self) -> usize,
        drop_nth: impl Fn(&mut Self, usize, &mut W),
        watch: &mut W,
    ) -> bool {
        let mut held = count(self);
        while held >= most && held > 0 {
            // Xorshift: good enough to spread displacement, and the same in every run.
            self.dice ^= self.dice << 13;
            self.dice ^= self.dice >> 7;
            self.dice ^= self.dice << 17;
            let place = self.dice % held as u64;
            drop_nth(self, usize::try_from(place).unwrap_or(0), watch);
            held -= 1;
        }
        most > 0
    }
}
