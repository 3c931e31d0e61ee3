//! Clearing an entry without a locked exchange is right exactly where hardware has no bit left to
//! set.
#![expect(unsafe_code, reason = "shares a table between threads")]

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mmu_gather::pagetable::{Entry, EntryValue, Level, StaleWrites, Table};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTable, PageTableFlags};

const A: PageTableFlags = PageTableFlags::ACCESSED;
const D: PageTableFlags = PageTableFlags::DIRTY;
const W: PageTableFlags = PageTableFlags::WRITABLE;

fn leaf(flags: PageTableFlags) -> EntryValue {
    EntryValue::leaf(Level::Pte, PhysAddr::new(0x5000), flags)
}

fn with(value: EntryValue, flags: PageTableFlags) -> EntryValue {
    EntryValue::from_bits(value.bits() | flags.bits())
}

/// What hardware may make of a present leaf in one step: SDM vol. 3A 4.8.
fn steps(value: EntryValue, stale: StaleWrites) -> Vec<EntryValue> {
    let mut after = vec![with(value, A)];
    if value.is_writable() || stale == StaleWrites::Possible {
        after.push(with(value, A | D));
    }
    after
}

fn all_flags() -> impl Iterator<Item = PageTableFlags> {
    let flags = |number: u32| {
        let bits = [A, D, W].into_iter().enumerate();
        bits.filter(|(bit, _)| number & (1 << bit) != 0)
            .fold(PageTableFlags::empty(), |all, (_, one)| all | one)
    };
    (0..8).map(flags)
}

#[test]
fn an_entry_is_settled_exactly_if_no_step_of_hardware_changes_it() {
    for stale in [StaleWrites::Impossible, StaleWrites::Possible] {
        for value in all_flags().map(leaf) {
            let changes = steps(value, stale).iter().any(|after| *after != value);
            // An entry is settled by the dirty bit or by missing rights; never where a bit could
            // still be set.
            assert_eq!(value.is_settled(stale), !changes, "{:?}, {stale:?}", value.flags());
        }
        assert!(!EntryValue::EMPTY.is_settled(stale));
    }
}

#[test]
fn the_bits_that_settle_a_line_settle_each_of_its_entries() {
    for stale in [StaleWrites::Impossible, StaleWrites::Possible] {
        for flags in all_flags() {
            assert!(with(leaf(flags), EntryValue::SETTLED).is_settled(stale), "{flags:?}, {stale:?}");
        }
    }
}

#[test]
fn a_line_is_settled_exactly_if_each_of_its_entries_is() {
    let accessed: Vec<EntryValue> = all_flags().filter(|flags| flags.contains(A)).map(leaf).collect();
    for stale in [StaleWrites::Impossible, StaleWrites::Possible] {
        for one in &accessed {
            for other in &accessed {
                for place in 0..8 {
                    // Bits beside those that decide: PAT, NX, user, and the address.
                    let mut line = [with(*other, PageTableFlags::HUGE_PAGE | PageTableFlags::NO_EXECUTE); 8];
                    line[place] = with(*one, PageTableFlags::USER_ACCESSIBLE | PageTableFlags::BIT_9);
                    let settled = EntryValue::are_settled_if_accessed(line.into_iter(), stale);
                    // Where writes may be stale, its dirty bits alone settle a line.
                    let each =
                        stale == StaleWrites::Impossible && line.iter().all(|value| value.is_settled(stale));
                    assert_eq!(settled, each, "{line:?}, {stale:?}");
                }
            }
        }
    }
}

const ROUNDS: usize = 40;
/// So many that clearing them takes about as long as a thread waits for a core on a busy machine.
const TABLES: usize = 64;

/// The race that the rule is about, on real memory: one thread is the page walker of a CPU whose
/// program writes, and sets A and D as hardware does, in one step with a look at P; the other
/// clears. The value that the clear returns must have each bit that was set before it.
#[test]
fn no_dirty_bit_is_lost_between_a_program_that_writes_and_a_clear_without_exchange() {
    let memory = Box::into_raw(Box::new([const { PageTable::new() }; TABLES])).cast::<[Table; TABLES]>();
    // SAFETY: a `Table` has the size and alignment of a `PageTable` (asserted in its crate) and
    // consists of atomics. The box is never freed, and nobody else refers to it.
    let tables: &[Table; TABLES] = unsafe { &*memory };
    let entries: Vec<&Entry> = tables.iter().flat_map(Table::entries).collect();
    let written: Vec<AtomicBool> = entries.iter().map(|_| AtomicBool::new(false)).collect();
    let (round, walking) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let kinds: Vec<PageTableFlags> = all_flags().collect();
    // Reported after the threads have finished: a thread that panics would leave the other waiting.
    let mut losses = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for now in 1..=ROUNDS {
                wait_for(&round, 2 * now - 1);
                walking.store(2 * now - 1, Ordering::Release);
                // Begins somewhere else each time, and goes around until the round is over.
                for index in (now * 4099..).map(|index| index % entries.len()) {
                    if write(entries[index]) {
                        written[index].store(true, Ordering::Relaxed);
                    }
                    if round.load(Ordering::Acquire) >= 2 * now {
                        break;
                    }
                }
                walking.store(2 * now, Ordering::Release);
            }
        });
        for now in 1..=ROUNDS {
            for (index, (entry, written)) in entries.iter().zip(&written).enumerate() {
                // SAFETY: the entry is in no table.
                unsafe { entry.store(leaf(kinds[(index * 5 + now) % kinds.len()])) };
                written.store(false, Ordering::Relaxed);
            }
            round.store(2 * now - 1, Ordering::Release);
            wait_for(&walking, 2 * now - 1);
            // SAFETY: the entry is in no table, and only the walker changes it, as hardware does.
            let clear =
                |entry: &&Entry| unsafe { entry.get_and_clear_seen(entry.load(), StaleWrites::Impossible) };
            let cleared: Vec<EntryValue> = entries.iter().map(clear).collect();
            round.store(2 * now, Ordering::Release);
            wait_for(&walking, 2 * now);
            for (index, (value, written)) in cleared.iter().zip(&written).enumerate() {
                let left = entries[index].load();
                if !left.is_empty() || written.load(Ordering::Relaxed) && !value.is_dirty() {
                    losses.push((now, index, value.flags(), left));
                }
            }
        }
    });
    assert!(losses.is_empty(), "(round, entry, what came out, what is left): {losses:?}");
}

/// Waits for the other thread, which may not have a core of its own.
fn wait_for(number: &AtomicUsize, at_least: usize) {
    while number.load(Ordering::Acquire) < at_least {
        for _ in 0..1000 {
            core::hint::spin_loop();
        }
        std::thread::yield_now();
    }
}

/// A program writes through the entry: whether it could.
fn write(entry: &Entry) -> bool {
    loop {
        let value = entry.load();
        if !value.is_present() || !value.is_writable() {
            return false;
        }
        // SAFETY: what hardware does, in one step.
        let set = || unsafe { entry.compare_exchange(value, with(value, A | D)) };
        if value == with(value, A | D) || set().is_ok() {
            return true;
        }
    }
}
