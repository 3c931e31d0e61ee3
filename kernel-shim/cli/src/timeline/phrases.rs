//! The words of one event: the few that fit into a column, and a sentence.

use mmu_gather::GatherEvent;
use mmu_gather::tlb::TlbEvent;
use mmu_hosted::FrameRole;
use mmu_hosted::watch::Use;
use mmu_hosted::{Detail, Event, Fill, Kept, Sequence, What};
use x86_64::structures::paging::PhysFrame;

use crate::output::words::counted;
use crate::timeline::names::Names;

fn hex(frame: PhysFrame) -> String {
    format!("{:x}", frame.start_address())
}

const fn role_word(role: FrameRole) -> &'static str {
    match role {
        FrameRole::Page => "frame",
        FrameRole::Block => "2 MiB block",
        FrameRole::Table => "table",
    }
}

/// What a CR3 load does to what is cached, in one word.
const fn kept(kept: Kept) -> &'static str {
    match kept {
        Kept::Yes => "keep",
        Kept::No => "flush",
    }
}

/// The text of a step, without its CPU.
pub(crate) fn call_text(sequence: &Sequence, step: usize) -> String {
    let text = sequence.steps.get(step).map(ToString::to_string).unwrap_or_default();
    text.split_once(' ').map(|(_, op)| op.to_owned()).unwrap_or_default()
}

/// In few words; addresses are hexadecimal.
pub(crate) fn short_phrase(what: What, names: &Names, sequence: &Sequence) -> String {
    match what {
        What::Allocated(frame, role) => format!("{} {} given out", role_word(role), hex(frame)),
        What::Freed(frame, role) => format!("{} {} freed", role_word(role), hex(frame)),
        What::Accessed(address, frame) => format!("uses {address:x} -> {}", hex(frame)),
        What::Invlpg(address) => format!("INVLPG {address:x}"),
        What::LoadedCr3(root, pcid, keeps) => {
            format!("CR3: {}, PCID {pcid}, {}", names.root(root), kept(keeps))
        }
        What::Sent(to) => format!("asks CPU {}", to.number()),
        What::Answered(from) => format!("answers CPU {}", from.number()),
        What::Lost(from) => format!("request of CPU {} LOST", from.number()),
        What::Unmapped(start, end) => format!("{start:x}-{end:x} unmapped"),
        What::Skipped(_) => "flush does NOTHING".to_owned(),
        What::Called(call) => format!("{} begins", call.word),
        What::Returned(call) => format!("{} has returned", call.word),
        What::Detail(detail) => short_detail(detail, names, sequence),
    }
}

fn short_detail(detail: Detail, names: &Names, sequence: &Sequence) -> String {
    match detail {
        Detail::Began(step, _) => call_text(sequence, step),
        Detail::Ended(_) => "done".to_owned(),
        Detail::Filled(address, frame, held, fill) => {
            let why = if fill == Fill::Speculation { "speculates: " } else { "" };
            match held.as_a {
                Use::Page(_) => format!("{why}caches {address:x} -> {}", hex(frame)),
                Use::Table(level) => format!("{why}caches {level} {} for {address:x}", hex(frame)),
                Use::Root => format!("root {}", hex(frame)),
            }
        }
        Detail::Mapped(_, address, frame) => format!("maps {address:x} -> {}", hex(frame)),
        Detail::Cleared(address, _, frame) => format!("clears {address:x} (was {})", hex(frame)),
        Detail::Restricted(address, _) => format!("{address:x} loses rights"),
        Detail::Tlb(event, slot) => {
            let slot = format!("slot gen {}", slot.tlb_gen.get());
            match event {
                TlbEvent::Requested { pages: Some(pages), .. } => {
                    format!("wants {} flushed", counted(pages, "page", "pages"))
                }
                TlbEvent::Requested { pages: None, .. } => "wants a full flush".to_owned(),
                TlbEvent::Raised { ctx_id, tlb_gen, .. } => {
                    format!("{} gen -> {}", names.context(ctx_id), tlb_gen.get())
                }
                TlbEvent::IpisSent(sent) => format!("{sent} answered"),
                TlbEvent::IpisSaved { lazy, elsewhere } => {
                    format!("skips {lazy} lazy, {elsewhere} elsewhere")
                }
                TlbEvent::FlushedPages(pages) => {
                    format!("flushed {}, {slot}", counted(pages, "page", "pages"))
                }
                TlbEvent::FlushedAll => format!("flushed all, {slot}"),
                TlbEvent::FlushedAllForPages => format!("gap: flushed all, {slot}"),
                TlbEvent::CaughtUp => format!("catches up, {slot}"),
                TlbEvent::AlreadyCurrent => "nothing to flush".to_owned(),
                TlbEvent::LeftLazyMm => "lazy: leaves".to_owned(),
                // An event of a later engine, by its own name.
                unknown => format!("{unknown:?}"),
            }
        }
        Detail::Gather(event) => short_gather(event),
        Detail::Violated(kind, ..) => format!("VIOLATION: {kind}"),
    }
}

fn short_gather(event: GatherEvent) -> String {
    match event {
        GatherEvent::BatchTaken => "takes a batch page".to_owned(),
        GatherEvent::BatchRefused => "no batch page".to_owned(),
        GatherEvent::ForcedFlush => "full: forced flush".to_owned(),
        GatherEvent::DirtyFlush => "dirty: flush under lock".to_owned(),
        GatherEvent::NestedFlush => "nested gather: whole flush".to_owned(),
        GatherEvent::DeferredFlushSeen => "sees reclaim's owed flush".to_owned(),
        GatherEvent::LockDropped { leaves } => {
            format!("unlocks, {}", counted(leaves.into(), "leaf", "leaves"))
        }
        GatherEvent::TableUnhooked(level) => format!("unhooks a {level:?} table"),
        GatherEvent::TableFallback => "no table batch: one alone".to_owned(),
        GatherEvent::Released { slots, tables } => {
            let tables = counted(tables, "table", "tables");
            format!("frees {}, {tables}", counted(slots, "page", "pages"))
        }
        unknown => format!("{unknown:?}"),
    }
}

/// In a sentence.
pub(crate) fn long_phrase(event: &Event, names: &Names, sequence: &Sequence) -> String {
    match event.what {
        What::Detail(Detail::Began(step, _)) => format!("begins: {}", call_text(sequence, step)),
        What::Detail(Detail::Ended(step)) => format!("done: {}", call_text(sequence, step)),
        What::LoadedCr3(root, pcid, keeps) => format!(
            "CR3 = {:#x} ({}), PCID {pcid}: what is cached under it is {}",
            root.start_address(),
            names.root(root),
            if keeps == Kept::Yes { "kept" } else { "dropped" }
        ),
        what => what.to_string(),
    }
}
