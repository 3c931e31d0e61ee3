//! A run that does not come back: nothing in this process can stop it, but it can be named.

use core::fmt;
use core::time::Duration;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::exit;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Instant;

use crate::machine::HostedMachine;
use crate::mutex::lock;
use crate::sequence::Sequence;
use crate::trap::Trap;

/// So many looks in a row that find a CPU where it has sent interrupts, and in no method of the
/// machine that waits, are enough: ten seconds.
const MOST_LOOKS: u32 = 20;

/// What runs now, for the thread that watches.
pub(crate) struct Watched {
    running: Mutex<Option<(Instant, String)>>,
    machine: Mutex<Weak<HostedMachine>>,
}

impl Watched {
    /// This sequence begins.
    pub(crate) fn begin(&self, sequence: &Sequence) {
        Trap::runs(sequence.seed);
        *lock(&self.running) = Some((Instant::now(), sequence.to_string()));
    }

    /// It, or a shorter form of it, begins on this machine.
    pub(crate) fn begins_on(&self, machine: &Arc<HostedMachine>) {
        *lock(&self.machine) = Arc::downgrade(machine);
        if let Some((began, _)) = &mut *lock(&self.running) {
            *began = Instant::now();
        }
    }

    /// Whether the sequence that runs has for longer than `most`.
    fn is_late(&self, most: Duration) -> bool {
        lock(&self.running).as_ref().is_some_and(|(began, _)| began.elapsed() > most)
    }

    /// The turn in which a CPU has sent flush interrupts, if it is still in it.
    fn turn_of_sender(&self) -> Option<u64> {
        lock(&self.machine).upgrade().and_then(|machine| machine.turn_of_sender())
    }

    fn text(&self) -> String {
        lock(&self.running).as_ref().map(|(_, sequence)| sequence.clone()).unwrap_or_default()
    }
}

/// Runs `work`, which says what it begins. If one of those takes longer than `most`, it is printed
/// and written to `file`, and the process ends.
pub(crate) fn watched<R>(most: Duration, file: Option<&Path>, work: impl FnOnce(&Watched) -> R) -> R {
    let _trap = Trap::set();
    let watched = Watched { running: Mutex::new(None), machine: Mutex::new(Weak::new()) };
    let (done, is_done) = channel::<()>();
    thread::scope(|scope| {
        let running = &watched;
        let watcher = thread::Builder::new().spawn_scoped(scope, move || {
            let look = most.min(Duration::from_secs(1)) / 2;
            let (mut sender, mut looks) = (None, 0);
            while is_done.recv_timeout(look) == Err(RecvTimeoutError::Timeout) {
                let now = running.turn_of_sender();
                looks = if now.is_some() && now == sender { looks + 1 } else { 0 };
                sender = now;
                if looks >= MOST_LOOKS || running.is_late(most) {
                    let waited = look * MOST_LOOKS;
                    give_up(
                        if looks > 0 { Stuck::Sent(waited.min(most)) } else { Stuck::Late(most) },
                        file,
                        &running.text(),
                    );
                }
            }
        });
        // Without a thread there is nobody who watches.
        drop(watcher);
        let result = work(&watched);
        drop(done);
        result
    })
}

/// Why nothing goes on.
enum Stuck {
    /// A CPU has sent flush interrupts, and lets nobody run since.
    Sent(Duration),
    /// Nobody knows.
    Late(Duration),
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sent(waited) => write!(
                f,
                "a CPU has sent flush interrupts, and has let no other CPU run for {waited:?}: is \
                 Cpus::wait_for_answers overridden with the machine's, which lets them run? A kernel with calls to \
                 other CPUs of its own waits by `wait_for_calls`"
            ),
            Self::Late(most) => write!(
                f,
                "a sequence has not come back in {most:?}, and no CPU of it gives way. Either a lock that does not \
                 let others run is held across a call of the machine (a lock of std?); or Cpus::wait_for_answers \
                 is not overridden with the machine's; or a loop has no end"
            ),
        }
    }
}

fn give_up(why: Stuck, file: Option<&Path>, sequence: &str) -> ! {
    let saved = file.map(|file| match fs::write(file, sequence) {
        Ok(()) => format!("saved as {}\n", file.display()),
        Err(error) => format!("cannot be saved as {}: {error}\n", file.display()),
    });
    // Not by `eprintln!`, which a test keeps until it ends.
    let _nobody_reads = write!(io::stderr(), "{why}\n{sequence}{}", saved.unwrap_or_default());
    exit(101)
}
