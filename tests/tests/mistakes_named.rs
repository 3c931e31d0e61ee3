//! What an embedder gets wrong about its CPUs or its memory, and what a debug build of the engine
//! says.
//!
//! `early_answers` has the handlers that acknowledge what they have not done.
#![cfg(debug_assertions)]
#![expect(unsafe_code, reason = "a machine that is wrong about its CPUs")]

use core::cell::{Cell, RefCell, UnsafeCell};
use core::panic::AssertUnwindSafe;
use core::pin::Pin;
use core::sync::atomic::AtomicU64;
use std::panic::catch_unwind;

use mmu_gather::pagetable::{AddressSpace, EntryValue, Level, PagingMode, TableLock, TableMemory};
use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FreedTables, MmContext, PageSpan,
    enter_lazy_tlb, flush_interrupt, flush_tlb_mm, flush_tlb_mm_range, init_cpu, offline_cpu, switch_mm,
};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

type Bits = [AtomicU64; 1];
type Context = MmContext<Bits>;

const CPU: [CpuId; 2] = [CpuId::new(0), CpuId::new(1)];
const SPAN: PageSpan = PageSpan { start: 0x7000, end: 0x8000, stride_shift: 12 };

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Nothing,
    OneCpuTlb,
    InterruptReachesNobody,
    HandlerOfAnother,
}

/// Two CPUs, played by one thread.
struct Machine {
    wrong: Wrong,
    cpus: [CpuTlb<Bits>; 2],
    cr3: [Cell<PhysFrame>; 2],
    here: Cell<CpuId>,
    ids: CtxIds,
    interrupted: RefCell<Vec<CpuId>>,
}

impl Machine {
    fn new(wrong: Wrong) -> Self {
        let machine = Self {
            wrong,
            cpus: [CpuTlb::new(), CpuTlb::new()],
            cr3: [const { Cell::new(root(0)) }; 2],
            here: Cell::new(CPU[0]),
            ids: CtxIds::new(),
            interrupted: RefCell::default(),
        };
        for cpu in CPU {
            // SAFETY: the thread plays `cpu`.
            machine.on(cpu, || unsafe { init_cpu(&machine, cpu) });
        }
        machine
    }

    fn context(&self, number: u64) -> Context {
        // SAFETY: one source of names, a root each.
        unsafe { MmContext::new(&self.ids, root(number)) }
    }

    fn on<R>(&self, cpu: CpuId, f: impl FnOnce() -> R) -> R {
        let before = self.here.replace(cpu);
        let result = f();
        self.here.set(before);
        result
    }

    fn run(&self, cpu: CpuId, mm: Option<Pin<&Context>>) {
        // SAFETY: the thread plays `cpu`, and contexts outlive the machine's use of them.
        self.on(cpu, || unsafe { switch_mm(self, cpu, mm) });
    }
}

const fn root(number: u64) -> PhysFrame {
    // SAFETY: a multiple of 4096.
    unsafe { PhysFrame::from_start_address_unchecked(PhysAddr::new_truncate(number << 12)) }
}

// SAFETY: the thread plays the CPU that `here` says, but for what is wrong on purpose.
unsafe impl Cpus for Machine {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here.get())
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[if self.wrong == Wrong::OneCpuTlb { 0 } else { cpu.index() }]
    }

    fn init_root(&self) -> PhysFrame {
        root(0)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        for cpu in targets.iter() {
            self.interrupted.borrow_mut().push(cpu);
            let named = match self.wrong {
                Wrong::InterruptReachesNobody => continue,
                Wrong::HandlerOfAnother => CPU[0],
                Wrong::Nothing | Wrong::OneCpuTlb => cpu,
            };
            // SAFETY: the thread plays `cpu`, which another handler may name wrongly.
            self.on(cpu, || unsafe { flush_interrupt(self, named) });
        }
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn invlpg(&self, _address: u64) {}

    unsafe fn load_cr3(&self, root: PhysFrame, _: Pcid, _: CachedTranslations) {
        self.cr3[self.here.get().index()].set(root);
    }

    fn cr3(&self) -> Option<PhysFrame> {
        Some(self.cr3[self.here.get().index()].get())
    }

    fn most_turns(&self) -> Option<u64> {
        Some(5000)
    }
}

/// What the engine says.
fn said(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("it must be named");
    *panic.downcast::<String>().expect("a text")
}

#[track_caller]
fn assert_said(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
}

#[test]
fn a_machine_that_does_it_right_is_told_nothing() {
    let machine = Machine::new(Wrong::Nothing);
    let [one, two] = [1, 2].map(|number| Box::pin(machine.context(number)));
    for cpu in CPU {
        machine.run(cpu, Some(one.as_ref()));
    }
    let _flushed = flush_tlb_mm_range(&machine, &one, SPAN, FreedTables::No);
    let _flushed = flush_tlb_mm(&machine, &one);
    let _flushed = flush_tlb_mm(&machine, &two);
    // SAFETY: the thread plays the CPU.
    machine.on(CPU[1], || unsafe { enter_lazy_tlb(&machine, CPU[1]) });
    let _flushed = flush_tlb_mm(&machine, &one);
    // SAFETY: as above.
    machine.on(CPU[1], || unsafe { offline_cpu(&machine, CPU[1]) });
    let _flushed = flush_tlb_mm(&machine, &one);
    assert_eq!(machine.interrupted.borrow().len(), 3);
    machine.run(CPU[0], None);
}

#[test]
fn one_cpu_tlb_for_all_cpus_is_named_when_the_second_cpu_starts() {
    let words = said(|| drop(Machine::new(Wrong::OneCpuTlb)));
    assert_said(&words, &["T2", "CPU 1 and CPU 0 have one CpuTlb"]);
}

#[test]
fn a_kernel_that_loads_cr3_past_switch_mm_is_named_when_it_flushes() {
    let machine = Machine::new(Wrong::Nothing);
    let mm = Box::pin(machine.context(1));
    machine.cr3[0].set(root(1));
    let said = said(|| {
        let _flushed = flush_tlb_mm_range(&machine, &mm, SPAN, FreedTables::No);
    });
    assert_said(&said, &["T4", "context 2 is in CR3 of CPU 0", "switch_mm has not put it there"]);
}

#[test]
fn another_root_in_cr3_than_switch_mm_has_loaded_is_named_where_it_is() {
    let machine = Machine::new(Wrong::Nothing);
    let mm = Box::pin(machine.context(1));
    for cpu in CPU {
        machine.run(cpu, Some(mm.as_ref()));
    }
    // On the CPU that is asked.
    machine.cr3[1].set(root(9));
    let words = said(|| {
        let _flushed = flush_tlb_mm_range(&machine, &mm, SPAN, FreedTables::No);
    });
    assert_said(&words, &["T4", "switch_mm has put context 2 into CR3 of CPU 1", "0x9000 is there now"]);
}

#[test]
fn a_context_that_moved_after_a_cpu_has_loaded_it_is_named() {
    let machine = Machine::new(Wrong::Nothing);
    let mut mm = machine.context(1);
    // SAFETY: it is not: the context moves below.
    machine.run(CPU[0], Some(unsafe { Pin::new_unchecked(&mm) }));
    machine.run(CPU[0], None);
    let mut moved = Box::new(machine.context(2));
    core::mem::swap(&mut *moved, &mut mm);
    let words = said(|| {
        let _flushed = flush_tlb_mm(&machine, &moved);
    });
    assert_said(&words, &["context 2 was at 0x", "Pin<Box<Mm>>"]);
    // SAFETY: it does not move any more.
    let words = said(|| machine.run(CPU[0], Some(unsafe { Pin::new_unchecked(&*moved) })));
    assert_said(&words, &["context 2 was at 0x"]);
}

/// Pages of an address space that no program has run in yet are unmapped, and flushed for: exec
/// moves its stack, fork fails.
#[test]
fn a_context_that_no_cpu_has_loaded_yet_may_move_after_a_flush() {
    let machine = Machine::new(Wrong::Nothing);
    let mm = machine.context(1);
    let _flushed = flush_tlb_mm(&machine, &mm);
    let _flushed = flush_tlb_mm_range(&machine, &mm, SPAN, FreedTables::Yes);
    let mm = Box::pin(mm);
    machine.run(CPU[0], Some(mm.as_ref()));
    let _flushed = flush_tlb_mm(&machine, &mm);
    machine.run(CPU[0], None);
}

#[test]
fn a_cpu_that_does_not_answer_is_named() {
    for freed in [FreedTables::No, FreedTables::Yes] {
        let machine = Machine::new(Wrong::InterruptReachesNobody);
        let mm = Box::pin(machine.context(1));
        for cpu in CPU {
            machine.run(cpu, Some(mm.as_ref()));
        }
        let words = said(|| {
            let _flushed = flush_tlb_mm_range(&machine, &mm, SPAN, freed);
        });
        assert_said(&words, &["CPU 0 has waited", "for CPU 1", "offline_cpu was not the last that it ran"]);
        // Its mail was taken back: it points to nothing that is gone.
        // SAFETY: the thread plays the CPU.
        machine.on(CPU[1], || unsafe { flush_interrupt(&machine, CPU[1]) });
    }
}

#[test]
fn a_handler_that_names_another_cpu_is_named() {
    let machine = Machine::new(Wrong::HandlerOfAnother);
    let mm = Box::pin(machine.context(1));
    for cpu in CPU {
        machine.run(cpu, Some(mm.as_ref()));
    }
    let words = said(|| {
        let _flushed = flush_tlb_mm(&machine, &mm);
    });
    assert_said(&words, &["flush_interrupt was called for CPU 0 on CPU 1"]);
}

/// Four frames, of which the last is given out as it is.
struct Memory {
    frames: [UnsafeCell<PageTable>; 4],
    locks: [TableLock<spin::Spin>; 4],
}

// SAFETY: a frame is an element, which stays where it is.
unsafe impl PageTableFrameMapping for Memory {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.frames[usize::try_from(frame.start_address().as_u64() >> 12).expect("small")].get()
    }
}

// SAFETY: not kept: `allocate_table` returns a frame that does not read as zero.
unsafe impl TableMemory for Memory {
    type Lock = TableLock<spin::Spin>;

    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<spin::Spin> {
        &self.locks[usize::try_from(frame.start_address().as_u64() >> 12).expect("small")]
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        Some(root(3))
    }

    unsafe fn free_tables(&self, _: &[PhysFrame]) {}
}

#[test]
fn a_new_table_that_does_not_read_as_zero_is_named() {
    let mut dirty = PageTable::new();
    dirty[77].set_addr(PhysAddr::new(0x5000), PageTableFlags::PRESENT);
    let memory = Memory {
        frames: [PageTable::new(), PageTable::new(), PageTable::new(), dirty].map(UnsafeCell::new),
        locks: [const { TableLock::new(()) }; 4],
    };
    // SAFETY: frame 0 is an empty table, and no CPU loads it.
    let space = unsafe { AddressSpace::new(root(0), PagingMode::FourLevel) };
    let leaf = EntryValue::leaf(Level::Pte, PhysAddr::new(0x9000), PageTableFlags::WRITABLE);
    // SAFETY: nobody frees tables, and no program runs.
    let words = said(|| unsafe { space.map(&memory, 0x40_0000, Level::Pte, leaf) }.expect("a frame"));
    assert_said(
        &words,
        &["allocate_table returned frame 0x3000", "entry 77 of it is 0x5001", "reads as zero"],
    );
}
