//! QEMU: how it is started, what it prints, and how it ends.

use core::time::Duration;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use crate::boot::{Accelerator, BootError};

/// A machine to be emulated.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) qemu: &'a Path,
    pub(crate) accelerator: Accelerator,
    pub(crate) nr_cpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) image: &'a Path,
    /// A file loaded beside the image.
    pub(crate) module: Option<&'a Path>,
    /// The kernel command line.
    pub(crate) command_line: &'a str,
}

/// Why the run ended; the numbers are those of `mmu_boot::exit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// 33: everything held.
    Pass,
    /// 35: a violation was found.
    Violation,
    /// 37: the command line asks for what the image cannot do.
    Usage,
    /// 39: the kernel panicked.
    Panic,
    /// 41: an exception in ring 0.
    Exception,
    /// 43: no CPU made progress; each has printed its state.
    Hang,
    /// 0: the machine was reset, by a fault on the way to a fault handler.
    Reset,
    /// The time given was over, and the image's own watchdog had not ended it.
    TimedOut,
}

impl Ending {
    const fn of_status(status: i32) -> Option<Self> {
        Some(match status {
            33 => Self::Pass,
            35 => Self::Violation,
            37 => Self::Usage,
            39 => Self::Panic,
            41 => Self::Exception,
            43 => Self::Hang,
            0 => Self::Reset,
            _ => return None,
        })
    }
}

impl Machine<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(self.qemu);
        let accelerator = match self.accelerator {
            Accelerator::Tcg => "tcg,thread=multi",
            Accelerator::Kvm => "kvm",
        };
        let (nr_cpus, memory) = (self.nr_cpus.to_string(), format!("{}M", self.memory_mib));
        command.args(["-accel", accelerator, "-smp", &nr_cpus, "-m", &memory]);
        if self.accelerator == Accelerator::Kvm {
            command.args(["-cpu", "host"]);
        }
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "stdio",
        ]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
        command.arg("-kernel").arg(self.image).args(["-append", self.command_line]);
        if let Some(module) = self.module {
            command.arg("-initrd").arg(module);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it to its end, or for `limit`, and hands every line it prints to `line`.
    pub(crate) fn run(&self, limit: Duration, mut line: impl FnMut(String)) -> Result<Ending, BootError> {
        let child = self.command().spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => BootError::NoQemu(self.qemu.to_owned()),
            _ => BootError::Qemu(format!("cannot run {}: {error}", self.qemu.display())),
        })?;
        let mut running = Running(child);
        let (sender, lines) = mpsc::channel();
        let console = running.0.stdout.take();
        let reader = thread::spawn(move || {
            // What is no text is shown as well as can be; a console that cannot be read is at its end.
            for bytes in
                console.into_iter().flat_map(|console| BufReader::new(console).split(b'\n').flatten())
            {
                let text = String::from_utf8_lossy(&bytes).trim_end_matches('\r').to_owned();
                if sender.send(text).is_err() {
                    break;
                }
            }
        });
        let complaints = running.0.stderr.take();
        let complaints = thread::spawn(move || {
            let mut text = Vec::new();
            let _ = complaints.map(|mut complaints| complaints.read_to_end(&mut text));
            String::from_utf8_lossy(&text).trim().to_owned()
        });
        let end = Instant::now() + limit;
        loop {
            match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(text) => line(text),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    // Ends it, so that its complaints come to an end too.
                    drop(running);
                    complaints.join().unwrap_or_default().lines().for_each(|text| line(text.to_owned()));
                    return Ok(Ending::TimedOut);
                }
            }
        }
        let status = running.0.wait().map_err(|error| BootError::Qemu(error.to_string()))?;
        let _ = reader.join();
        let complaints = complaints.join().unwrap_or_default();
        status.code().and_then(Ending::of_status).ok_or_else(|| {
            BootError::Qemu(if complaints.is_empty() { status.to_string() } else { complaints })
        })
    }
}

/// A child that does not outlive this command's interest in it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail if it has ended, which is all that is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The first line of `qemu --version`.
pub(crate) fn version(qemu: &Path) -> Option<String> {
    let output = Command::new(qemu).arg("--version").stdin(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}
