//! What the program on a CPU is doing: for the report, and for whoever looks why a run is stuck.

use core::fmt;

macro_rules! doings {
    ($($name:ident: $words:literal,)*) => {
        /// What the program on a CPU is doing.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub(crate) enum Doing { $($name,)* }

        const ALL: &[Doing] = &[$(Doing::$name,)*];

        impl fmt::Display for Doing {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$name => $words,)* })
            }
        }
    };
}

doings! {
    Nothing: "nothing",
    Meet: "waiting for the others at the end of a phase",
    Map: "mmap",
    Unmap: "munmap",
    Discard: "madvise(MADV_DONTNEED)",
    Protect: "mprotect",
    Move: "mremap",
    MoveStack: "exec's stack move",
    Fork: "fork",
    Exit: "exit",
    Reclaim: "reclaim",
    Fault: "a fault",
    Switch: "a switch",
    GoLazy: "going lazy",
    GoOff: "going off, and coming back",
    Use: "using memory",
}

impl Doing {
    /// The one with this number.
    pub(crate) fn from_number(number: u64) -> Self {
        usize::try_from(number).ok().and_then(|number| ALL.get(number).copied()).unwrap_or(Self::Nothing)
    }

    /// Whether it takes mapped pages away, all or some, from programs that run.
    pub(crate) const fn is_an_unmapping(self) -> bool {
        matches!(
            self,
            Self::Unmap | Self::Discard | Self::Move | Self::MoveStack | Self::Exit | Self::Reclaim
        )
    }
}
