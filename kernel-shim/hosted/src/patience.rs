//! A run that does not come back: nothing in this process can stop it, but it can be named.

use core::time::Duration;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::exit;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// What runs now, for the thread that watches.
pub(crate) struct Watched(Mutex<Option<(Instant, String)>>);

impl Watched {
    /// This sequence begins.
    pub(crate) fn begin(&self, sequence: &impl ToString) {
        self.set(Some((Instant::now(), sequence.to_string())));
    }

    /// A shorter form of it begins.
    pub(crate) fn begin_again(&self) {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((began, _)) = &mut *running {
            *began = Instant::now();
        }
    }

    fn set(&self, running: Option<(Instant, String)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = running;
    }

    /// The sequence that runs, if it has for longer than `most`.
    fn stuck(&self, most: Duration) -> Option<String> {
        let running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().filter(|(began, _)| began.elapsed() > most).map(|(_, sequence)| sequence.clone())
    }
}

/// Runs `work`, which says what it begins. If one of those takes longer than `most`, it is printed
/// and written to `file`, and the process ends.
pub(crate) fn watched<R>(most: Duration, file: Option<&Path>, work: impl FnOnce(&Watched) -> R) -> R {
    let watched = Watched(Mutex::new(None));
    let (done, is_done) = channel::<()>();
    thread::scope(|scope| {
        let running = &watched;
        let watcher = thread::Builder::new().spawn_scoped(scope, move || {
            let look = most.min(Duration::from_secs(1)) / 2;
            while is_done.recv_timeout(look) == Err(RecvTimeoutError::Timeout) {
                if let Some(sequence) = running.stuck(most) {
                    give_up(most, file, &sequence);
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

fn give_up(most: Duration, file: Option<&Path>, sequence: &str) -> ! {
    let saved = file.map(|file| match fs::write(file, sequence) {
        Ok(()) => format!("saved as {}\n", file.display()),
        Err(error) => format!("cannot be saved as {}: {error}\n", file.display()),
    });
    // Not by `eprintln!`, which a test keeps until it ends.
    let _nobody_reads = writeln!(
        io::stderr(),
        "a sequence has not come back in {most:?}, and no CPU of it gives way: a lock that does not let others run \
         is held across a call of the machine (a lock of std?), or a loop has no end\n{sequence}{}",
        saved.unwrap_or_default()
    );
    exit(101)
}
