//! A CPU sets D between any two instructions of a call: between the load of an entry and the store
//! that clears it, too.
//!
//! Virtual CPUs change over at seams, and an engine that reads an entry and stores to it has none
//! between the two. So here the host's CPU takes the call one instruction at a time, by its trap
//! flag, and at one of them another virtual CPU writes to the page. The call is run once for each
//! instruction from its first look at the locked table until the entry is gone: all interleavings
//! with one write.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(unsafe_code, reason = "takes signals; takes rights away under the table lock; opens gathers")]

use core::cell::Cell;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Once;

use mmu_adapter::{Hosted, HostedKernel, HostedMm, HostedStage, touch};
use mmu_gather::pagetable::{EntryValue, Level, TableMemory, TableView, VirtRange};
use mmu_gather::tlb::CpuId;
use mmu_gather::{Fate, MmuGather, Vma as EngineVma, VmaKind};
use mmu_hosted::features::{Features, SettingDirty};
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{
    Area, AreaKind, Config, EngineArea, FrameKind, Machine, PageContent, Protection, SeamLock, Stage,
    UserAccess, Vma,
};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::paging::PageTableFlags;

const PAGE: u64 = 0x7000_0000_0000;
const PROGRAM: CpuId = CpuId::new(1);
/// More instructions than there are between the first look at a table and the clearing of its first
/// entry: a few dozen.
const MOST_STEPS: u32 = 2000;

type Space = HostedMm;
type Gather<'a> = MmuGather<'a, 'a, HostedKernel>;

/// What happens between the instructions of this thread.
struct Probe {
    machine: *const HostedMachine,
    /// The lock of the table, and the page's entry in it.
    lock: *const SeamLock<Hosted>,
    entry: *const AtomicU64,
    /// The program writes before this instruction, counted from the first one that finds the table
    /// locked and the entry there.
    write_at: u32,
    steps: Cell<u32>,
    wrote: Cell<bool>,
}

thread_local! {
    static PROBE: Cell<*const Probe> = const { Cell::new(ptr::null()) };
}

/// A look at the table: from here on, instruction by instruction.
extern "C" fn on_fault(_: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    let probe = PROBE.get();
    if probe.is_null() {
        // SAFETY: no probe, no protected table: a real fault, which has to end the process.
        unsafe { libc::abort() };
    }
    // SAFETY: set by `call_with_write_at` for as long as it watches a call on this thread.
    unprotect(unsafe { (*probe).entry });
    set_trap_flag(context, true);
}

/// Between two instructions.
extern "C" fn on_trap(_: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    let probe = PROBE.get();
    if probe.is_null() {
        set_trap_flag(context, false);
        return;
    }
    // SAFETY: as in `on_fault`.
    let probe = unsafe { &*probe };
    // SAFETY: the machine's, which outlives the probe.
    let lock = unsafe { &*probe.lock };
    if !lock.is_locked() {
        // A walk of some CPU, not the call's look at the entry.
        set_protection(probe.entry, libc::PROT_NONE);
        set_trap_flag(context, false);
        return;
    }
    // SAFETY: as above; all access to entries is atomic.
    let entry = unsafe { &*probe.entry };
    let is_there = entry.load(Ordering::Relaxed) != 0;
    if is_there {
        let step = probe.steps.get();
        probe.steps.set(step + 1);
        if step == probe.write_at {
            // SAFETY: as above. What is interrupted here is the engine between its lock of the
            // table and the clearing of the first entry, which calls nobody: nothing that this
            // needs is held.
            let machine = unsafe { &*probe.machine };
            let written =
                machine.on_cpu(PROGRAM, || machine.user_access(PAGE, mmu_hosted::UserAccess::Write));
            probe.wrote.set(written.is_ok());
        }
    }
    set_trap_flag(context, is_there && probe.steps.get() <= probe.write_at);
}

fn set_trap_flag(context: *mut c_void, on: bool) {
    let flag = RFlags::TRAP_FLAG.bits().cast_signed();
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the third argument of a handler installed with SA_SIGINFO.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let flags = &mut registers[libc::REG_EFL as usize];
    *flags = if on { *flags | flag } else { *flags & !flag };
}

fn set_protection(entry: *const AtomicU64, protection: i32) {
    let table = entry.map_addr(|address| address & !0xfff).cast_mut().cast::<c_void>();
    // SAFETY: a frame of the machine's memory is a page of the host's, which this thread alone
    // uses.
    let failed = unsafe { libc::mprotect(table, 4096, protection) };
    assert_eq!(failed, 0, "the host refuses to protect a page");
}

fn unprotect(entry: *const AtomicU64) {
    set_protection(entry, libc::PROT_READ | libc::PROT_WRITE);
}

fn take_signals() {
    static ONCE: Once = Once::new();
    type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);
    ONCE.call_once(|| {
        for (signal, handler) in [(libc::SIGTRAP, on_trap as Handler), (libc::SIGSEGV, on_fault as Handler)] {
            // SAFETY: all zeroes are an action without flags and with an empty mask.
            let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            // SAFETY: a handler of the form that SA_SIGINFO asks for.
            let failed = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
            assert_eq!(failed, 0, "the host refuses a handler");
        }
    });
}

/// What one run came to.
struct Run {
    /// Whether there were so many instructions.
    was_reached: bool,
    /// Whether the program wrote, and whether the page of the file is known to be dirty after the
    /// call.
    wrote: bool,
    is_dirty: bool,
}

/// CPU 1 has two pages of a file cached, writable and clean. On CPU 0 a gather takes W away and is
/// not flushed yet; the program writes to the first page before instruction `write_at` of `call`,
/// which clears it.
fn call_with_write_at(
    write_at: u32,
    dirty: SettingDirty,
    call: fn(&HostedKernel, &Space, &mut Gather<'_>),
) -> Run {
    let base = Options::new(2, 1024, 1);
    let options = Options { features: Features { dirty, ..base.features }, ..base };
    let stage =
        HostedStage::boot(HostedMachine::new(options).expect("memory"), Config::default()).expect("frames");
    let kernel = stage.kernel();
    let mm = kernel.new_mm().expect("frames");
    kernel.mmap(&mm, Vma { range: pages(4), area: shared() }).expect("nothing is there");
    stage.on_cpu(PROGRAM, &|| {
        kernel.switch_to(Some(&mm));
        for address in [PAGE, PAGE + 4096] {
            touch(kernel, &mm, address, UserAccess::Read);
        }
    });
    // SAFETY: the map lock is not needed by one thread; no table is freed meanwhile.
    let view = unsafe { mm.engine().space().find_table(kernel, PAGE, Level::Pte) }.expect("pages are mapped");
    // SAFETY: no call changes areas while this gather is open.
    let mut gather = unsafe { MmuGather::new(kernel, mm.engine()) };
    let locked = view.lock(kernel);
    for address in [PAGE, PAGE + 4096] {
        let old = locked.entry(address).load();
        assert!(old.is_writable() && !old.is_dirty(), "{old:?}");
        let new = EntryValue::from_bits(old.bits() & !PageTableFlags::WRITABLE.bits());
        // SAFETY: the gather is told before the lock drops.
        unsafe { locked.entry(address).compare_exchange(old, new) }.expect("nobody else is here");
        gather.changed(VirtRange::of_entry(Level::Pte, address), Level::Pte);
    }
    drop(locked);
    let frame = kernel
        .cached_pages()
        .into_iter()
        .find(|frame| view.load(PAGE).leaf_address(Level::Pte) == frame.start_address());
    let frame = frame.expect("a page of a file");
    let (was_reached, wrote) = step_through(kernel, &view, write_at, || call(kernel, &mm, &mut gather));
    gather.flush().free();
    check(kernel);
    // A page that nothing maps any more has been written back, if it was known to be dirty.
    let is_written_back = !kernel.machine().was_written(frame);
    Run { was_reached, wrote, is_dirty: is_written_back || kernel.frames().meta(frame).is_dirty() }
}

/// Runs `call`; before its instruction `write_at` under the lock of `view` the program writes to
/// [`PAGE`], whose entry is in that table. Whether there were so many, and whether it wrote.
fn step_through(
    kernel: &HostedKernel,
    view: &TableView<'_>,
    write_at: u32,
    call: impl FnOnce(),
) -> (bool, bool) {
    take_signals();
    let entry = kernel.machine().frame_to_pointer(view.frame()).cast::<AtomicU64>();
    let probe = Probe {
        machine: ptr::from_ref(&**kernel.machine()),
        // SAFETY: the view's table, which nobody frees.
        lock: ptr::from_ref(unsafe { kernel.table_lock(view.frame()) }),
        entry: entry.wrapping_add(view.level().index(PAGE)),
        write_at,
        steps: Cell::new(0),
        wrote: Cell::new(false),
    };
    set_protection(probe.entry, libc::PROT_NONE);
    PROBE.set(&raw const probe);
    call();
    PROBE.set(ptr::null());
    unprotect(probe.entry);
    (probe.steps.get() > write_at, probe.wrote.get())
}

fn check(kernel: &HostedKernel) {
    let found = kernel.machine().violations();
    assert_eq!(found.count, 0, "{}", found.told[0]);
}

/// No write is lost, at whatever instruction it comes; and there are some.
fn no_write_is_lost(call: fn(&HostedKernel, &Space, &mut Gather<'_>)) {
    let (mut instructions, mut writes) = (0, 0);
    let mut lost = Vec::new();
    loop {
        let run = call_with_write_at(instructions, SettingDirty::Unchecked, call);
        if !run.was_reached {
            break;
        }
        writes += u32::from(run.wrote);
        if run.wrote && !run.is_dirty {
            lost.push(instructions);
        }
        instructions += 1;
        assert!(instructions < MOST_STEPS, "the entry is never cleared");
    }
    assert!(writes > 0, "{writes} writes at {instructions} instructions");
    assert!(lost.is_empty(), "a write is lost at instruction {lost:?} of {instructions}");
}

fn pages(count: u64) -> VirtRange {
    VirtRange::new(PAGE, PAGE + count * 4096).expect("a good range")
}

fn shared() -> Area {
    Area { kind: AreaKind::FileShared(1), protection: Protection::Write, ..Area::anon() }
}

/// Two pages: a gather of its own, which finds the other one open (rule G6).
fn discard_two(kernel: &HostedKernel, mm: &Space, _: &mut Gather<'_>) {
    kernel.madvise_dontneed(mm, pages(2)).expect("no split");
}

/// One page: the short way.
fn discard_one(kernel: &HostedKernel, mm: &Space, _: &mut Gather<'_>) {
    kernel.madvise_dontneed(mm, pages(1)).expect("no split");
}

/// The gather that took the rights away clears the entries, too.
fn zap_in_the_same_gather(_: &HostedKernel, _: &Space, gather: &mut Gather<'_>) {
    let area = EngineArea { area: shared(), markers: Fate::Keep };
    gather
        .zap_vma_range(&EngineVma { range: pages(4), kind: VmaKind::Normal, area }, pages(2))
        .expect("no leaf is cut");
}

#[test]
fn a_write_to_a_page_that_loses_its_rights_in_another_gather_is_not_lost() {
    no_write_is_lost(discard_two);
}

#[test]
fn a_write_to_a_page_that_loses_its_rights_in_another_gather_is_not_lost_the_short_way() {
    no_write_is_lost(discard_one);
}

#[test]
fn a_write_to_a_page_that_lost_its_rights_in_the_same_gather_is_not_lost() {
    no_write_is_lost(zap_in_the_same_gather);
}

/// Where rights are looked at, the write faults, whenever it comes.
#[test]
fn a_cpu_with_shadow_stacks_does_not_write_to_a_page_that_has_lost_its_rights() {
    for call in [discard_one, discard_two, zap_in_the_same_gather] {
        for write_at in 0.. {
            let run = call_with_write_at(write_at, SettingDirty::Checked, call);
            assert!(!run.wrote);
            if !run.was_reached || write_at > 40 {
                break;
            }
        }
    }
}

/// Whether there were so many instructions; whether the program wrote to a large page before
/// `write_at` of reclaim, which found it clean; and whether the page is still there.
fn reclaim_with_write_at(write_at: u32) -> (bool, bool, bool) {
    let machine = HostedMachine::new(Options::new(2, 4096, 1)).expect("memory");
    let stage = HostedStage::boot(machine, Config::default()).expect("frames");
    let kernel = stage.kernel();
    let mm = kernel.new_mm().expect("frames");
    let block = pages(512);
    kernel.mmap(&mm, Vma { range: block, area: Area::anon() }).expect("nothing is there");
    kernel.populate(&mm, block, PageContent::CleanBlock).expect("frames");
    stage.on_cpu(PROGRAM, &|| {
        kernel.switch_to(Some(&mm));
        touch(kernel, &mm, PAGE, UserAccess::Read);
    });
    // SAFETY: as in `call_with_write_at`.
    let view = unsafe { mm.engine().space().find_table(kernel, PAGE, Level::Pmd) }.expect("it is mapped");
    let (was_reached, wrote) = step_through(kernel, &view, write_at, || {
        kernel.reclaim([(&*mm, block)]);
    });
    check(kernel);
    let is_mapped = view.load(PAGE).is_present();
    assert_eq!(kernel.frames().count(FrameKind::Block), u64::from(is_mapped));
    (was_reached, wrote, is_mapped)
}

#[test]
fn a_large_page_that_is_written_to_while_reclaim_takes_it_stays() {
    let mut writes = 0;
    for write_at in 0..MOST_STEPS {
        let (was_reached, wrote, is_mapped) = reclaim_with_write_at(write_at);
        if !was_reached {
            break;
        }
        writes += u32::from(wrote);
        assert!(is_mapped || !wrote, "a write is lost at instruction {write_at}");
    }
    assert!(writes > 0);
}
