//! What must not outlive this command, however it ends: children, and files that are not whole yet.
//!
//! Each is removed when its owner is dropped. Where a signal (SIGINT, SIGTERM, SIGHUP) ends the
//! process before that, a signal handler removes what is noted here. SIGKILL leaves files, but no
//! child.
#![expect(
    unsafe_code,
    reason = "signal handlers and process groups have no safe form in the standard library"
)]

use core::ffi::c_char;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicI32, AtomicPtr, Ordering};
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Once;

/// How many of each can be noted at a time; further ones are removed only when dropped.
const SLOTS: usize = 8;

/// Process groups to be killed; 0 for none.
static GROUPS: [AtomicI32; SLOTS] = [const { AtomicI32::new(0) }; SLOTS];
/// Names of files to be removed, which are never freed: a handler may be reading one. Null for
/// none.
static FILES: [AtomicPtr<c_char>; SLOTS] = [const { AtomicPtr::new(ptr::null_mut()) }; SLOTS];

const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

extern "C" fn clear_away(signal: libc::c_int) {
    for group in &GROUPS {
        let group = group.load(Ordering::Relaxed);
        if group > 0 {
            // SAFETY: kill is async-signal-safe and takes numbers only.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
    }
    for file in &FILES {
        // ORDERING: pairs with the exchange in `UnfinishedFile::new`: the name is whole.
        let name = file.load(Ordering::Acquire);
        if !name.is_null() {
            // SAFETY: unlink is async-signal-safe; the name is a string of C that is never freed.
            unsafe { libc::unlink(name) };
        }
    }
    // SAFETY: async-signal-safe, and numbers only. The signal comes again when this handler
    // returns, and ends the process.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: as above.
    unsafe { libc::raise(signal) };
}

fn listen() {
    static LISTENING: Once = Once::new();
    LISTENING.call_once(|| {
        for signal in SIGNALS {
            let mut now = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: only asks; writes one `sigaction`, which is large enough.
            let asked = unsafe { libc::sigaction(signal, ptr::null(), now.as_mut_ptr()) };
            // SAFETY: zeroes are a `sigaction`, and what the call has written is one.
            let now = unsafe { now.assume_init() };
            // What is ignored (nohup, say) stays so.
            if asked == 0 && now.sa_sigaction == libc::SIG_DFL {
                let handler: extern "C" fn(libc::c_int) = clear_away;
                // SAFETY: the handler calls what is async-signal-safe, and nothing else.
                unsafe { libc::signal(signal, handler as libc::sighandler_t) };
            }
        }
    });
}

/// A child in a process group of its own, which is killed with all that it has started when this is
/// dropped, and when this process ends.
#[derive(Debug)]
pub(crate) struct ChildGroup {
    pub(crate) child: Child,
    slot: Option<&'static AtomicI32>,
}

impl ChildGroup {
    pub(crate) fn spawn(command: &mut Command) -> io::Result<Self> {
        listen();
        command.process_group(0);
        let die_with_us = || {
            // SAFETY: takes numbers only. Called between fork and exec, where system calls are
            // allowed.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            Ok(())
        };
        // SAFETY: `die_with_us` makes one system call and touches no memory.
        unsafe { command.pre_exec(die_with_us) };
        let child = command.spawn()?;
        let id = i32::try_from(child.id()).unwrap_or(0);
        let free =
            |slot: &&AtomicI32| slot.compare_exchange(0, id, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        Ok(Self { child, slot: GROUPS.iter().find(free) })
    }
}

impl Drop for ChildGroup {
    fn drop(&mut self) {
        // A child that was waited for has given up its process ID.
        if let Ok(None) = self.child.try_wait()
            && let Ok(id) = i32::try_from(self.child.id())
        {
            // SAFETY: takes numbers only; the child is not waited for, so the group is still its
            // own.
            unsafe { libc::kill(-id, libc::SIGKILL) };
            let _ = self.child.wait();
        }
        if let Some(slot) = self.slot {
            slot.store(0, Ordering::Relaxed);
        }
    }
}

/// A file that goes when this is dropped, or when this process ends.
#[derive(Debug)]
pub(crate) struct UnfinishedFile {
    path: PathBuf,
    slot: Option<&'static AtomicPtr<c_char>>,
}

impl UnfinishedFile {
    /// Notes that the file at `path`, which may not be there yet, is to go.
    pub(crate) fn new(path: &Path) -> Self {
        listen();
        let name = CString::new(path.as_os_str().as_bytes()).map_or(ptr::null_mut(), CString::into_raw);
        let free = |slot: &&AtomicPtr<c_char>| {
            // ORDERING: Release pairs with the load in `clear_away`, which must see the whole name.
            slot.compare_exchange(ptr::null_mut(), name, Ordering::Release, Ordering::Relaxed).is_ok()
        };
        Self { path: path.to_owned(), slot: FILES.iter().find(free) }
    }

    /// Its name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnfinishedFile {
    fn drop(&mut self) {
        // The file may have been renamed by now; then there is nothing to remove.
        let _ = std::fs::remove_file(&self.path);
        if let Some(slot) = self.slot {
            slot.store(ptr::null_mut(), Ordering::Relaxed);
        }
    }
}
