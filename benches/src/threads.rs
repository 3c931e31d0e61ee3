//! CPUs played by threads: flush requests go from one real core to another, and each thread polls
//! for its interrupts. Requests go through the engine's mailbox, or through one written by hand for
//! this machine alone, which the engine's is held against.
#![expect(unsafe_code, reason = "implements the engine's Cpus; requests are passed by pointer")]

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, FlushRequest, flush_interrupt, flush_tlb_func,
};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

use mmu_measured::machine::Bits;

/// The most CPUs there can be.
pub const MAX_CPUS: usize = 16;

type Request = FlushRequest<'static, Bits>;

/// What other CPUs write to: one line for the pending bits, and a slot for each initiator.
#[derive(Debug)]
#[repr(align(64))]
struct Mailbox {
    /// Bit `initiator` is set when its slot was filled.
    pending: AtomicU64,
    slots: [Padded; MAX_CPUS],
}

/// What a thread that plays a CPU does besides flushing.
pub trait Play: Cpus<Bits = Bits> {
    /// The CPU that this thread plays.
    fn cpu(&self) -> &Cpu<'_>;

    /// Answers the requests that have arrived.
    fn poll(&self);

    /// Answers others until all CPUs have called this.
    fn answer_until_all_finish(&self) {
        let threads = self.cpu().threads;
        let all = threads.states.len();
        threads.finished.fetch_add(1, Ordering::AcqRel);
        let mut turns = 0;
        while threads.finished.load(Ordering::Acquire) != all {
            self.poll();
            pause(&mut turns);
        }
    }
}

/// Gives way now and then: there may be more CPUs than cores.
fn pause(turns: &mut u32) {
    *turns = turns.wrapping_add(1);
    if turns.is_multiple_of(64) { std::thread::yield_now() } else { core::hint::spin_loop() }
}

#[derive(Debug)]
#[repr(align(64))]
struct Padded(AtomicPtr<Request>);

/// What one CPU did; on a line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Work {
    invalidations: AtomicU64,
}

/// A set of CPUs, one a thread.
#[derive(Debug)]
pub struct Threads {
    states: Vec<CpuTlb<Bits>>,
    mailboxes: Vec<Mailbox>,
    work: Vec<Work>,
    finished: AtomicUsize,
}

impl Threads {
    /// `count` CPUs.
    ///
    /// # Panics
    /// If that is more than [`MAX_CPUS`].
    #[must_use]
    pub fn new(count: usize) -> Self {
        assert!(count <= MAX_CPUS, "{count} CPUs are more than {MAX_CPUS}");
        let mailbox = || Mailbox {
            pending: AtomicU64::new(0),
            slots: core::array::from_fn(|_| Padded(AtomicPtr::new(ptr::null_mut()))),
        };
        Self {
            states: (0..count).map(|_| CpuTlb::new()).collect(),
            mailboxes: (0..count).map(|_| mailbox()).collect(),
            work: (0..count).map(|_| Work::default()).collect(),
            finished: AtomicUsize::new(0),
        }
    }

    /// Invalidations (of a page or a context) carried out by all CPUs.
    #[must_use]
    pub fn invalidations(&self) -> u64 {
        self.work.iter().map(|work| work.invalidations.load(Ordering::Relaxed)).sum()
    }
}

/// One CPU: what the thread that plays it uses.
#[derive(Clone, Copy, Debug)]
pub struct Cpu<'t> {
    threads: &'t Threads,
    me: CpuId,
}

impl<'t> Cpu<'t> {
    /// CPU number `number`.
    ///
    /// # Safety
    /// One thread at a time plays this CPU.
    ///
    /// # Panics
    /// If there is no such CPU.
    #[must_use]
    pub unsafe fn new(threads: &'t Threads, number: u32) -> Self {
        let me = CpuId::new(number);
        assert!(me.index() < threads.states.len(), "{me} does not exist");
        Self { threads, me }
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> CpuId {
        self.me
    }

    #[inline]
    fn count(&self) {
        let counter = &self.threads.work[self.me.index()].invalidations;
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

impl Play for Cpu<'_> {
    fn cpu(&self) -> &Cpu<'_> {
        self
    }

    #[inline]
    fn poll(&self) {
        let mailbox = &self.threads.mailboxes[self.me.index()];
        if mailbox.pending.load(Ordering::Relaxed) == 0 {
            return;
        }
        // ORDERING: acquire, pairs with the release in `flush_others`: the slots of these bits are
        // filled.
        let mut bits = mailbox.pending.swap(0, Ordering::AcqRel);
        while bits != 0 {
            let slot = &mailbox.slots[bits.trailing_zeros() as usize].0;
            bits &= bits - 1;
            let request = slot.load(Ordering::Acquire);
            debug_assert!(!request.is_null(), "a pending bit without a request");
            // SAFETY: the initiator stored a pointer to a request on its stack, and waits until the
            // slot is null again.
            let request = unsafe { &*request };
            // SAFETY: this thread plays this CPU (contract of `new`), and nothing interrupts it.
            unsafe { flush_tlb_func(self, self.me, request) };
            // ORDERING: release, pairs with the acquire in `flush_others`: the request is no longer
            // used.
            slot.store(ptr::null_mut(), Ordering::Release);
        }
    }
}

// SAFETY: `cpu_state` indexes a vector that does not change; `pinned` names the CPU that its thread
// plays, and a thread plays one CPU only; requests are answered in `poll` only, which
// without_interrupts' closures do not call; `flush_others` waits until every slot it filled is null
// again, which a target does after `flush_tlb_func`; there are no translations to drop.
unsafe impl Cpus for Cpu<'_> {
    type Bits = Bits;

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.me)
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.threads.states[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::zero())
    }

    fn flush_others(
        &self,
        targets: &CpuSet<Bits>,
        request: &FlushRequest<'_, Bits>,
        meanwhile: impl FnOnce(),
    ) {
        let request = ptr::from_ref(request).cast::<Request>().cast_mut();
        for target in targets.iter() {
            let mailbox = &self.threads.mailboxes[target.index()];
            mailbox.slots[self.me.index()].0.store(request, Ordering::Relaxed);
            // ORDERING: release, pairs with the swap in `poll`.
            mailbox.pending.fetch_or(1 << self.me.index(), Ordering::AcqRel);
        }
        meanwhile();
        for target in targets.iter() {
            let slot = &self.threads.mailboxes[target.index()].slots[self.me.index()].0;
            // ORDERING: acquire, pairs with the store in `poll`.
            let mut turns = 0;
            while !slot.load(Ordering::Acquire).is_null() {
                self.poll();
                pause(&mut turns);
            }
        }
    }

    #[inline]
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline]
    fn invlpg(&self, _address: u64) {
        self.count();
    }

    unsafe fn load_cr3(&self, _root: PhysFrame, _pcid: Pcid, cached: CachedTranslations) {
        if cached == CachedTranslations::Flush {
            self.count();
        }
    }
}

/// The same CPU, whose requests go through the engine's mailbox.
#[derive(Debug)]
pub struct ByMail<'t> {
    cpu: Cpu<'t>,
    turns: Cell<u32>,
}

impl<'t> ByMail<'t> {
    /// That CPU.
    #[must_use]
    pub const fn new(cpu: Cpu<'t>) -> Self {
        Self { cpu, turns: Cell::new(0) }
    }
}

impl Play for ByMail<'_> {
    fn cpu(&self) -> &Cpu<'_> {
        &self.cpu
    }

    #[inline]
    fn poll(&self) {
        // SAFETY: this thread plays this CPU (contract of `Cpu::new`), and nothing interrupts it.
        unsafe { flush_interrupt(self, self.cpu.me) };
    }
}

// SAFETY: as for `Cpu`, whose states these are; requests go by mail, which each CPU takes in `poll`
// and while it waits.
unsafe impl Cpus for ByMail<'_> {
    type Bits = Bits;

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.cpu.pinned(f)
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        self.cpu.cpu_state(cpu)
    }

    fn init_root(&self) -> PhysFrame {
        self.cpu.init_root()
    }

    /// Nothing: each CPU looks at its mail, as it does at what is written by hand.
    fn send_flush_interrupt(&self, _targets: &CpuSet<Bits>) {}

    fn wait_for_answers(&self, _answers: Answers<'_, Bits>) {
        let mut turns = self.turns.get();
        pause(&mut turns);
        self.turns.set(turns);
    }

    #[inline]
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline]
    fn invlpg(&self, address: u64) {
        self.cpu.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // SAFETY: passed on to our caller.
        unsafe { self.cpu.load_cr3(root, pcid, cached) };
    }
}
