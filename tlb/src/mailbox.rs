//! A CPU's mailbox: what other CPUs ask of it, and what it asks of them.
//!
//! In: requests of initiators, by pointer. Out: each request once to each of its targets, and to
//! the initiator the news that all have answered. `Cpus::flush_others` fills it,
//! `delivery` empties it.
//!
//! ```text
//!  initiator (CPU a)                               target (CPU b, interrupts off)
//!  M1  a.request = the request                     M5  taken = b.from.swap(0)      (acquire)
//!  M2  a.unanswered = targets                      M6  for each: run a.request
//!  M3  b.from |= a              (release)          M7  a.unanswered -= b           (release)
//!      nothing was there: interrupt b
//!  M4  until a.unanswered is empty (acquire):
//!      take what others ask, as b does
//! ```
//!
//! - Answers are counted for each (initiator, target): no two requests share a count.
//! - A CPU that waits takes its own mail, so two initiators never block each other, interrupts on
//!   or off.
//! - Mail that finds other mail unread sends no second interrupt: whoever takes the first takes
//!   both.
//! - Nothing is allocated. A CPU has at most one request out, and room for one of every other CPU.
//!
//! A request writes one line of the target's mailbox (two, in sets of more than 64 CPUs) and one of
//! the initiator's; a CPU without mail writes none.
//!
//! Linux: call_single_queue and cfd_data, kernel/smp.c, which allocate a record for each pair.
#![expect(unsafe_code, reason = "hands a pointer to a request from one CPU to another")]

use core::fmt;
use core::ptr;

use crate::cpuset::{CpuBits, CpuId, CpuSet, empty_words, members};
use crate::request::FlushRequest;
use crate::sync::{AtomicPtr, AtomicU64, Ordering, const_fn};

/// What one CPU has been asked, and what it has asked of others.
pub(crate) struct Mailbox<B: CpuBits> {
    inbox: Inbox<B>,
    outbox: Outbox<B>,
}

/// The initiators whose request this CPU has not taken yet. They write it, and this CPU.
#[repr(C, align(64))]
struct Inbox<B: CpuBits> {
    /// Bit n of the words: CPU n.
    from: B,
    /// Bit n: word n has mail, or had some when it was last looked at. Not used with a single word.
    words_with_mail: AtomicU64,
}

/// The request this CPU has sent, and who has not answered. This CPU writes it, and its targets.
#[repr(C, align(64))]
struct Outbox<B: CpuBits> {
    /// Valid while `unanswered` has members.
    request: AtomicPtr<FlushRequest<'static, B>>,
    unanswered: CpuSet<B>,
}

/// Mail that was taken and is not read yet: back it goes if reading unwinds.
struct PutBack<'a, B: CpuBits> {
    inbox: &'a Inbox<B>,
    /// Which word.
    number: u32,
    bits: u64,
}

impl<B: CpuBits> Drop for PutBack<'_, B> {
    #[inline]
    fn drop(&mut self) {
        if self.bits != 0 {
            let words = self.inbox.from.words();
            // ORDERING: release, as in `post`: the requests were seen here, and are to be seen
            // again.
            words[self.number as usize].fetch_or(self.bits, Ordering::Release);
            self.inbox.words_with_mail.fetch_or(1 << self.number, Ordering::Release);
        }
    }
}

/// The answers that a CPU waits for. See [`Cpus::wait_for_answers`](crate::Cpus::wait_for_answers).
#[derive(Clone, Copy, Debug)]
pub struct Answers<'a, B: CpuBits>(&'a Mailbox<B>);

impl<B: CpuBits> Answers<'_, B> {
    /// Whether all are there.
    #[must_use]
    #[inline]
    pub fn are_complete(&self) -> bool {
        self.0.is_answered()
    }

    /// The CPUs whose answer is missing, lowest first; for a watchdog to print.
    pub fn missing(&self) -> impl Iterator<Item = CpuId> + '_ {
        self.0.unanswered().iter()
    }
}

/// What becomes of mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unread {
    /// There was none before: the target must be interrupted.
    First,
    /// There was some, for which the target has been interrupted, or is about to be.
    More,
}

impl<B: CpuBits> Mailbox<B> {
    const_fn! {
        pub(crate) fn new() -> Self {
            Self {
                inbox: Inbox { from: empty_words!(B), words_with_mail: AtomicU64::new(0) },
                outbox: Outbox { request: AtomicPtr::new(ptr::null_mut()), unanswered: CpuSet::empty() },
            }
        }
    }

    /// M1 and M2: this CPU is about to ask `targets`.
    ///
    /// # Safety
    /// `request` lives until [`is_answered`](Self::is_answered) says so.
    ///
    /// # Panics
    /// If an earlier request of this CPU is not answered yet, or sets of CPUs have no room for it.
    pub(crate) unsafe fn begin(&self, targets: &CpuSet<B>, request: &FlushRequest<'_, B>) {
        let Outbox { request: slot, unanswered } = &self.outbox;
        assert!(
            unanswered.is_empty(),
            "a flush began on a CPU that waits for another: `pinned` let something else run there"
        );
        let words = self.inbox.from.words().len();
        assert!(place(request.initiator()).0 < words, "{} has no place in a mailbox", request.initiator());
        // The targets first: from here on a second request of this CPU is refused.
        // ORDERING: relaxed; M3 publishes both, and M5 comes before anybody reads them.
        unanswered.copy_from(targets);
        slot.store(ptr::from_ref(request).cast_mut().cast(), Ordering::Relaxed);
    }

    /// M3: `initiator` has a request for this CPU.
    #[must_use]
    pub(crate) fn post(&self, initiator: CpuId) -> Unread {
        let words = self.inbox.from.words();
        let (word, bit) = place(initiator);
        // ORDERING: release, pairs with `take`: whoever finds the initiator there finds its
        // request.
        let mut before = words[word].fetch_or(bit, Ordering::Release);
        if words.len() > 1 {
            // ORDERING: release, pairs with `take`: whoever finds this bit finds the one before it.
            before = self.inbox.words_with_mail.fetch_or(1 << word, Ordering::Release);
        }
        if before == 0 { Unread::First } else { Unread::More }
    }

    /// Whether there is mail, as far as this CPU can see.
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        match self.inbox.from.words() {
            [word] => word.load(Ordering::Relaxed) != 0,
            _ => self.inbox.words_with_mail.load(Ordering::Relaxed) != 0,
        }
    }

    /// M5: calls `read` for each CPU that has a request for this one, which is then taken.
    ///
    /// If `read` unwinds, its request and those not read yet are put back.
    #[inline]
    pub(crate) fn take(&self, mut read: impl FnMut(CpuId)) {
        let Inbox { from, words_with_mail } = &self.inbox;
        let words = from.words();
        let with_mail = match words {
            [_] => 1,
            _ if words_with_mail.load(Ordering::Relaxed) == 0 => 0,
            // ORDERING: acquire, pairs with `post`. Cleared before the words are read: a bit that
            // is set again meanwhile stays, and came with an interrupt.
            _ => words_with_mail.swap(0, Ordering::Acquire),
        };
        for number in members(with_mail) {
            let word = &words[number as usize];
            if word.load(Ordering::Relaxed) != 0 {
                // ORDERING: acquire, pairs with `post`.
                let mut unread =
                    PutBack { inbox: &self.inbox, number, bits: word.swap(0, Ordering::Acquire) };
                while unread.bits != 0 {
                    read(CpuId::new(number * 64 + unread.bits.trailing_zeros()));
                    unread.bits &= unread.bits - 1;
                }
            }
        }
    }

    /// The request that this CPU, an initiator, has sent.
    ///
    /// # Safety
    /// The caller has just taken it from its own inbox, and has not [`answered`](Self::answer): the
    /// reference is used no longer than that.
    pub(crate) unsafe fn request(&self) -> &FlushRequest<'_, B> {
        let request = self.outbox.request.load(Ordering::Relaxed);
        // SAFETY: `begin` stored it before the caller was posted to, from a reference that lives
        // until the caller has answered. The shorter lifetime is that of this borrow.
        unsafe { &*request.cast::<FlushRequest<'_, B>>() }
    }

    /// M7: `target` has done what this CPU, the initiator, asked. The request is not touched any
    /// more.
    pub(crate) fn answer(&self, target: CpuId) {
        // ORDERING: release (`clear` is SeqCst), pairs with `is_answered`: what the target flushed,
        // and its last use of what it held before, comes before the initiator goes on.
        self.outbox.unanswered.clear(target);
    }

    /// M4: whether every target has answered.
    #[must_use]
    #[inline]
    pub(crate) fn is_answered(&self) -> bool {
        // ORDERING: acquire, pairs with `answer`.
        self.outbox.unanswered.is_empty()
    }

    /// The targets that have not answered.
    pub(crate) fn unanswered(&self) -> &CpuSet<B> {
        &self.outbox.unanswered
    }

    /// As seen by the kernel, while this CPU waits.
    pub(crate) const fn answers(&self) -> Answers<'_, B> {
        Answers(self)
    }

    /// Takes a request back that this CPU has not taken. False: it has, and will answer.
    #[must_use]
    pub(crate) fn withdraw(&self, initiator: CpuId) -> bool {
        let (word, bit) = place(initiator);
        // Relaxed: who takes it back has nothing to learn, and nobody else takes it.
        self.inbox.from.words()[word].fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }

    /// The CPUs whose request this one has not taken.
    fn from(&self) -> impl Iterator<Item = CpuId> + '_ {
        let words = self.inbox.from.words().iter().zip(0..);
        words.flat_map(|(word, number)| {
            members(word.load(Ordering::Relaxed)).map(move |bit| CpuId::new(number * 64 + bit))
        })
    }
}

/// The word and the bit of `cpu`.
const fn place(cpu: CpuId) -> (usize, u64) {
    (cpu.index() / 64, 1 << (cpu.index() % 64))
}

/// For `Debug`: the CPUs whose mail is not taken.
struct From<'a, B: CpuBits>(&'a Mailbox<B>);

impl<B: CpuBits> fmt::Debug for From<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.from()).finish()
    }
}

impl<B: CpuBits> fmt::Debug for Mailbox<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox")
            .field("from", &From(self))
            .field("unanswered", &self.outbox.unanswered)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(mmu_loom)))]
mod tests {
    extern crate std;

    use super::{Mailbox, Unread};
    use crate::cpuset::{CpuId, CpuSet};
    use crate::request::{FlushKind, FlushRequest, FreedTables};
    use crate::sync::AtomicU64;
    use std::vec::Vec;

    type Small = [AtomicU64; 1];
    type Large = [AtomicU64; 64];

    fn taken<const WORDS: usize>(mailbox: &Mailbox<[AtomicU64; WORDS]>) -> Vec<u32> {
        let mut taken = Vec::new();
        mailbox.take(|initiator| taken.push(initiator.number()));
        taken
    }

    #[test]
    fn only_mail_that_finds_the_inbox_empty_asks_for_an_interrupt() {
        fn post<const WORDS: usize>(mailbox: &Mailbox<[AtomicU64; WORDS]>, from: u32) -> Unread {
            mailbox.post(CpuId::new(from))
        }
        let small = Mailbox::<Small>::new();
        assert_eq!([3, 63, 0].map(|from| post(&small, from)), [Unread::First, Unread::More, Unread::More]);
        assert_eq!(taken(&small), [0, 3, 63]);
        assert_eq!(post(&small, 3), Unread::First);
        let large = Mailbox::<Large>::new();
        for _ in 0..2 {
            let posted = [4095, 70, 71, 0].map(|from| post(&large, from));
            assert_eq!(posted[0], Unread::First);
            assert!(posted[1..].iter().all(|unread| *unread == Unread::More), "{posted:?}");
            assert_eq!(taken(&large), [0, 70, 71, 4095]);
            assert!(taken(&large).is_empty());
        }
    }

    #[test]
    fn mail_is_taken_by_its_cpu_or_back_by_its_initiator_never_by_both() {
        let mailbox = Mailbox::<Large>::new();
        assert_eq!(mailbox.post(CpuId::new(100)), Unread::First);
        assert_eq!(mailbox.post(CpuId::new(200)), Unread::More);
        assert!(mailbox.withdraw(CpuId::new(100)));
        assert!(!mailbox.withdraw(CpuId::new(100)));
        assert_eq!(taken(&mailbox), [200]);
        assert!(!mailbox.withdraw(CpuId::new(200)));
    }

    #[test]
    fn answers_are_complete_when_each_target_has_answered() {
        let mailbox = Mailbox::<Large>::new();
        let targets = [1, 64, 4095].map(CpuId::new);
        let mut set = CpuSet::empty();
        targets.into_iter().for_each(|target| set.insert(target));
        let request = FlushRequest::from_flush(FlushKind::AllUpdated, FreedTables::No, CpuId::new(0));
        for _ in 0..2 {
            assert!(mailbox.is_answered());
            // SAFETY: the request outlives the mailbox's use of it, which ends below.
            unsafe { mailbox.begin(&set, &request) };
            assert!(mailbox.unanswered().iter().eq(targets));
            for target in targets {
                assert!(!mailbox.answers().are_complete());
                mailbox.answer(target);
            }
        }
        assert!(mailbox.answers().are_complete());
    }

    #[test]
    #[should_panic(expected = "a flush began on a CPU that waits for another")]
    fn a_second_request_of_a_cpu_that_waits_is_refused() {
        let mailbox = Mailbox::<Small>::new();
        let mut set = CpuSet::empty();
        set.insert(CpuId::new(1));
        let request = FlushRequest::from_flush(FlushKind::AllUpdated, FreedTables::No, CpuId::new(0));
        for _ in 0..2 {
            // SAFETY: nobody follows the pointer.
            unsafe { mailbox.begin(&set, &request) };
        }
    }
}
