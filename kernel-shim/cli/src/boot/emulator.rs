//! QEMU: how it is started, what it prints, and how it ends.

use core::time::Duration;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use crate::boot::error::BootError;
use crate::boot::options::Accelerator;
use crate::output::cleanup::ChildGroup;

/// A machine to be emulated.
#[derive(Debug)]
pub(crate) struct Emulator<'a> {
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
    const fn from_exit_status(status: i32) -> Option<Self> {
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

impl Emulator<'_> {
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

    /// Runs QEMU until it ends, or for `limit`, and hands every line that the image prints to
    /// `line`.
    ///
    /// # Errors
    /// [`BootError`] if QEMU cannot be run, is killed by somebody, or ends with an unknown status.
    pub(crate) fn run(&self, limit: Duration, mut line: impl FnMut(String)) -> Result<Ending, BootError> {
        let mut running = spawn(self.qemu, &mut self.command())?;
        let (sender, lines) = mpsc::channel();
        let console = running.child.stdout.take();
        thread::spawn(move || {
            // Bytes that are not text are shown as well as possible. A console that cannot be read
            // has ended.
            for bytes in
                console.into_iter().flat_map(|console| BufReader::new(console).split(b'\n').flatten())
            {
                let text = String::from_utf8_lossy(&bytes).trim_end_matches('\r').to_owned();
                if sender.send(text).is_err() {
                    break;
                }
            }
        });
        let complaints = rest_of(running.child.stderr.take());
        let end = Instant::now() + limit;
        loop {
            match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(text) => line(text),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => return Ok(Ending::TimedOut),
            }
        }
        // The console is closed, which does not mean that it has ended.
        let Some(status) = wait_until(&mut running, end)? else { return Ok(Ending::TimedOut) };
        let complaints = complaints();
        if let Some(signal) = status.signal() {
            return Err(BootError::Qemu(format!("killed by signal {signal}")));
        }
        // On SIGTERM and the like QEMU ends with the status of a reset; only these words tell the
        // two apart.
        if let Some(killed) = complaints.lines().find(|line| line.contains("terminating on signal")) {
            return Err(BootError::Qemu(killed.to_owned()));
        }
        status.code().and_then(Ending::from_exit_status).ok_or_else(|| {
            let words = complaints.lines().collect::<Vec<_>>().join("; ");
            BootError::Qemu(if words.is_empty() { status.to_string() } else { words })
        })
    }
}

fn spawn(qemu: &Path, command: &mut Command) -> Result<ChildGroup, BootError> {
    ChildGroup::spawn(command).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => BootError::NoQemu(qemu.to_owned()),
        _ => BootError::Qemu(format!("cannot run {}: {error}", qemu.display())),
    })
}

/// Waits for a child, not longer than until `end`.
fn wait_until(running: &mut ChildGroup, end: Instant) -> Result<Option<ExitStatus>, BootError> {
    loop {
        let status = running.child.try_wait().map_err(|error| BootError::Qemu(error.to_string()))?;
        if status.is_some() || Instant::now() >= end {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Reads a pipe in a thread of its own. The function returned gives what was read, and waits only
/// shortly for the end of the pipe: a process that the child has started may hold it open.
fn rest_of(pipe: Option<impl Read + Send + 'static>) -> impl FnOnce() -> String {
    const PATIENCE: Duration = Duration::from_secs(1);
    let (sender, text) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
        let _ = sender.send(String::from_utf8_lossy(&bytes).trim().to_owned());
    });
    move || text.recv_timeout(PATIENCE).unwrap_or_default()
}

/// The first line of `qemu --version`.
///
/// # Errors
/// [`BootError`] if QEMU cannot be run, or does not end within `limit`.
pub(crate) fn emulator_version(qemu: &Path, limit: Duration) -> Result<String, BootError> {
    let mut command = Command::new(qemu);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut running = spawn(qemu, &mut command)?;
    let text = rest_of(running.child.stdout.take());
    if wait_until(&mut running, Instant::now() + limit)?.is_none() {
        return Err(BootError::Qemu(format!("{} --version does not end", qemu.display())));
    }
    let version = text().lines().next().map(str::to_owned);
    Ok(version.unwrap_or_else(|| "an emulator without a version".to_owned()))
}
