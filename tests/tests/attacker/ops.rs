//! What the attacker can do: every safe call that takes part in state, with arguments that need not
//! make sense.

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};

/// One move. Numbers are taken modulo what there is; addresses may be anything.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    // What an honest kernel does meanwhile.
    Map { mm: u8, place: u8 },
    Use { cpu: u8, mm: u8, place: u8 },
    Touch { cpu: u8, place: u8, write: bool },
    Speculate { cpu: u8, place: u8 },
    Run { cpu: u8, mm: u8 },
    Leave { cpu: u8, how: u8 },
    PlayCpu { cpu: u8 },
    Reclaim { batch: u8, mm: u8, place: u8 },
    Munmap { mm: u8, area: u8 },
    Zap { mm: u8, area: u8 },
    Supply { batches: u64 },
    // Gathers.
    Open { mm: u8, dying: bool },
    WithLimits { gather: u8, limits: [u16; 5] },
    UnmapVmas { gather: u8, vmas: Vec<NonsenseVma>, within: Nonsense, iterator: u8 },
    ZapVmaRange { gather: u8, vma: NonsenseVma, within: Nonsense },
    Changed { gather: u8, range: Nonsense, level: u8 },
    Unhook { mm: u8, place: u8 },
    RemoveTable { gather: u8, table: u8, address: Address },
    LoseTable { table: u8 },
    FlushTlbOnly { gather: u8 },
    FlushMmu { gather: u8 },
    FlushPfnMaps { gather: u8 },
    NoteDeferred { gather: u8 },
    NoteDeferredOf { gather: u8, mm: u8, place: u8, level: u8 },
    FindLargeLeaf { gather: u8, range: Nonsense },
    Flush { gather: u8 },
    DropGather { gather: u8 },
    ForgetGather { gather: u8 },
    Free { flushed: u8, how: u8 },
    // Contexts, batches of reclaim, flushes of one's own.
    RaiseTlbGen { mm: u8 },
    OweFlush { mm: u8 },
    AddMm { batch: u8, mm: u8 },
    FlushBatch { batch: u8 },
    DropBatch { batch: u8 },
    FlushMm { mm: u8 },
    FlushRange { mm: u8, span: (Address, Address, u32), tables: bool },
    FlushPending { mm: u8 },
    LookAtMm { mm: u8, cpu: u32 },
    MixReceipts { mm: u8 },
    OwnCpuSet { cpus: Vec<u32> },
    // Tables.
    LookAtTable { mm: u8, place: u8, level: u8, range: Nonsense },
    LockTable { mm: u8, place: u8, level: u8, entries: (usize, usize), try_only: bool },
    // What a platform does for the engine, asked for by somebody else.
    Platform { what: u8, address: Address },
    // In the middle of the engine's work, where no lock is held.
    Hook { at: u8, mm: u8, what: u8 },
}

/// Somewhere, or nowhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub(crate) place: u8,
    pub(crate) bias: u8,
    pub(crate) any: u64,
}

/// Two addresses, and what is made of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Nonsense {
    pub(crate) ends: (Address, Address),
    pub(crate) how: u8,
    pub(crate) level: u8,
}

/// A range: of an area, of everything, or of nothing that exists.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NonsenseVma {
    pub(crate) range: Nonsense,
    pub(crate) kind: bool,
    pub(crate) backing: u8,
}

/// A place, most often one of the first few, so that moves meet.
fn place() -> impl Strategy<Value = u8> {
    prop_oneof![3 => 0..3u8, 1 => any::<u8>()]
}

/// An address space, most often the first.
fn mm() -> impl Strategy<Value = u8> {
    prop_oneof![3 => Just(0), 1 => any::<u8>()]
}

fn address() -> impl Strategy<Value = Address> {
    (place(), any::<u8>(), any::<u64>()).prop_map(|(place, bias, any)| Address { place, bias, any })
}

fn nonsense() -> impl Strategy<Value = Nonsense> {
    (address(), address(), any::<u8>(), any::<u8>()).prop_map(|(one, other, how, level)| Nonsense {
        ends: (one, other),
        how,
        level,
    })
}

fn vma() -> impl Strategy<Value = NonsenseVma> {
    (nonsense(), any::<bool>(), any::<u8>()).prop_map(|(range, kind, backing)| NonsenseVma {
        range,
        kind,
        backing,
    })
}

fn honest() -> impl Strategy<Value = Op> {
    let n = any::<u8>;
    prop_oneof![
        6 => (mm(), place()).prop_map(|(mm, place)| Op::Map { mm, place }),
        8 => (n(), mm(), place()).prop_map(|(cpu, mm, place)| Op::Use { cpu, mm, place }),
        6 => (n(), place(), any::<bool>()).prop_map(|(cpu, place, write)| Op::Touch { cpu, place, write }),
        2 => (n(), place()).prop_map(|(cpu, place)| Op::Speculate { cpu, place }),
        6 => (n(), mm()).prop_map(|(cpu, mm)| Op::Run { cpu, mm }),
        4 => (n(), n()).prop_map(|(cpu, how)| Op::Leave { cpu, how }),
        1 => n().prop_map(|cpu| Op::PlayCpu { cpu }),
        6 => (n(), mm(), place()).prop_map(|(batch, mm, place)| Op::Reclaim { batch, mm, place }),
        1 => (mm(), mm()).prop_map(|(mm, area)| Op::Munmap { mm, area }),
        4 => (mm(), mm()).prop_map(|(mm, area)| Op::Zap { mm, area }),
        1 => any::<u64>().prop_map(|batches| Op::Supply { batches }),
    ]
}

fn of_gathers() -> impl Strategy<Value = Op> {
    let n = any::<u8>;
    prop_oneof![
        5 => (mm(), n()).prop_map(|(mm, dying)| Op::Open { mm, dying: dying < 40 }),
        2 => (n(), any::<[u16; 5]>()).prop_map(|(gather, limits)| {
            // Most often less than there is room for.
            let limits = limits.map(|limit| if limit < 60_000 { limit % 12 } else { limit });
            Op::WithLimits { gather, limits }
        }),
        4 => (n(), vec(vma(), 0..4), nonsense(), n())
            .prop_map(|(gather, vmas, within, iterator)| Op::UnmapVmas { gather, vmas, within, iterator }),
        4 => (n(), vma(), nonsense()).prop_map(|(gather, vma, within)| Op::ZapVmaRange { gather, vma, within }),
        1 => (n(), nonsense(), n()).prop_map(|(gather, range, level)| Op::Changed { gather, range, level }),
        3 => (mm(), place()).prop_map(|(mm, place)| Op::Unhook { mm, place }),
        3 => (n(), n(), address())
            .prop_map(|(gather, table, address)| Op::RemoveTable { gather, table, address }),
        1 => n().prop_map(|table| Op::LoseTable { table }),
        2 => n().prop_map(|gather| Op::FlushTlbOnly { gather }),
        2 => n().prop_map(|gather| Op::FlushMmu { gather }),
        1 => n().prop_map(|gather| Op::FlushPfnMaps { gather }),
        1 => n().prop_map(|gather| Op::NoteDeferred { gather }),
        1 => (n(), mm(), place(), n())
            .prop_map(|(gather, mm, place, level)| Op::NoteDeferredOf { gather, mm, place, level }),
        1 => (n(), nonsense()).prop_map(|(gather, range)| Op::FindLargeLeaf { gather, range }),
        6 => n().prop_map(|gather| Op::Flush { gather }),
        2 => n().prop_map(|gather| Op::DropGather { gather }),
        // Seldom: after a gather was leaked, every flush is a full flush.
        1 => n().prop_map(|gather| match gather {
            0..40 => Op::ForgetGather { gather },
            _ => Op::Flush { gather },
        }),
        3 => (n(), n()).prop_map(|(flushed, how)| Op::Free { flushed, how }),
    ]
}

fn of_flushes() -> impl Strategy<Value = Op> {
    let n = any::<u8>;
    let entries = || prop_oneof![4 => 0..520usize, 1 => any::<usize>()];
    prop_oneof![
        2 => mm().prop_map(|mm| Op::RaiseTlbGen { mm }),
        1 => mm().prop_map(|mm| Op::OweFlush { mm }),
        1 => (n(), mm()).prop_map(|(batch, mm)| Op::AddMm { batch, mm }),
        3 => n().prop_map(|batch| Op::FlushBatch { batch }),
        1 => n().prop_map(|batch| Op::DropBatch { batch }),
        1 => mm().prop_map(|mm| Op::FlushMm { mm }),
        4 => (n(), address(), address(), prop_oneof![Just(12), Just(21), 0..70u32, any::<u32>()], any::<bool>())
            .prop_map(|(mm, start, end, stride, tables)| Op::FlushRange { mm, span: (start, end, stride), tables }),
        1 => mm().prop_map(|mm| Op::FlushPending { mm }),
        1 => (mm(), 0..70u32).prop_map(|(mm, cpu)| Op::LookAtMm { mm, cpu }),
        8 => mm().prop_map(|mm| Op::MixReceipts { mm }),
        1 => vec(0..70u32, 0..6).prop_map(|cpus| Op::OwnCpuSet { cpus }),
        1 => (mm(), place(), n(), nonsense())
            .prop_map(|(mm, place, level, range)| Op::LookAtTable { mm, place, level, range }),
        2 => (n(), n(), n(), (entries(), entries()), any::<bool>())
            .prop_map(|(mm, place, level, entries, try_only)| Op::LockTable { mm, place, level, entries, try_only }),
        1 => (n(), address()).prop_map(|(what, address)| Op::Platform { what, address }),
        3 => (n(), mm(), n()).prop_map(|(at, mm, what)| Op::Hook { at, mm, what }),
    ]
}

/// A sequence of moves.
pub(crate) fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    vec(prop_oneof![5 => honest(), 5 => of_gathers(), 3 => of_flushes()], 1..most)
}
