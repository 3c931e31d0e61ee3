//! What can be asked of the image: its workloads, the faults planted in it, how QEMU runs it.

use core::fmt;

use clap::ValueEnum;

/// What the image runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// drill, threads, churn, lazy, rivals, swap and measure, one after the other: more than
    /// 100,000 pages, 1,000 shootdowns and 100 exits on four CPUs.
    Full,
    /// The parts of full, in a few seconds.
    Short,
    /// Threads use memory while another CPU unmaps it.
    Threads,
    /// Processes start and exit on every CPU.
    Churn,
    /// CPUs keep an address space loaded without running it, while its pages and tables are freed.
    Lazy,
    /// CPUs drop pages of one address space at the same time, and then all read them.
    Rivals,
    /// CPUs go round address spaces of their own and a shared one, and check what they read.
    Swap,
    /// A fixed sequence of calls, whose counters are compared with those of the hosted machine.
    Drill,
    /// Measures instructions, flushes and interrupts, in emulated cycles.
    Measure,
    /// Builds and tears down the layout of --layout; counters are compared as in drill.
    Layout,
    /// Tests the hardware part of the image alone, without the kernel.
    SelfTest,
    /// Hangs on purpose, to show what is reported then.
    Hang,
    /// Panics on purpose, to show what is reported then.
    Panic,
}

impl Workload {
    /// The parts that the image must have run, in order, for a run without a violation to mean
    /// anything.
    pub(crate) const fn phases(self, fault: Option<BootFault>) -> &'static [&'static str] {
        match (self, fault) {
            (Self::Full | Self::Short, None) => {
                &["drill", "threads", "churn", "lazy", "rivals", "swap", "measure"]
            }
            (Self::Full | Self::Short, Some(_)) => &["threads", "churn", "lazy", "rivals", "swap", "measure"],
            (Self::Threads, _) => &["threads"],
            (Self::Churn, _) => &["churn"],
            (Self::Lazy, _) => &["lazy"],
            (Self::Rivals, _) => &["rivals"],
            (Self::Swap, _) => &["swap"],
            (Self::Drill, _) => &["drill"],
            (Self::Measure, _) => &["measure"],
            (Self::Layout, _) => &["layout"],
            (Self::SelfTest | Self::Hang | Self::Panic, _) => &[],
        }
    }

    /// Whether, with several CPUs, each run of this workload makes a CPU tell others to flush.
    /// Processes that stay on one CPU each do not, and without a kernel there are no flushes.
    pub(crate) const fn shoots_down(self) -> bool {
        !matches!(self, Self::Churn | Self::SelfTest | Self::Hang | Self::Panic)
    }
}

/// A fault that is planted in the kernel of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(clippy::enum_variant_names, reason = "the words on the command line")]
pub enum BootFault {
    /// The CPU that unmaps does not flush its own TLB.
    SkipLocalFlush,
    /// A CPU that is told to flush does not.
    SkipRemoteFlush,
    /// Pages are freed as soon as their entries are cleared, before any flush.
    FreeBeforeFlush,
}

impl BootFault {
    /// Whether a program of this workload notices what the fault does. Where no program reads what
    /// another CPU has taken away, or programs only read, the image would end without a violation,
    /// and would be taken for blind.
    pub(crate) const fn shows_in(self, workload: Workload) -> bool {
        match workload {
            Workload::Full | Workload::Short | Workload::Threads => true,
            Workload::Rivals | Workload::Swap => matches!(self, Self::SkipLocalFlush | Self::SkipRemoteFlush),
            Workload::Lazy => matches!(self, Self::SkipRemoteFlush),
            _ => false,
        }
    }
}

/// How QEMU runs the CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// In software, with a host thread for each CPU.
    Tcg,
    /// On the CPUs of the host, through Linux's KVM.
    Kvm,
}

/// A size of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mebibytes(pub u64);

/// The word of the command line, which is also the word of the image.
pub(crate) fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self))
    }
}

impl fmt::Display for BootFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self))
    }
}

/// Reads a size of memory.
///
/// # Errors
/// What was expected, in words.
pub(crate) fn parse_memory(text: &str) -> Result<Mebibytes, String> {
    let (number, unit) = match text.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let number: Option<u64> = number.parse().ok();
    let size = number.and_then(|number| number.checked_mul(unit)).filter(|size| *size <= 1 << 20);
    size.map(Mebibytes).ok_or_else(|| "expected a size such as 256M or 2G".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_a_number_with_a_unit() {
        assert_eq!(parse_memory("256M"), Ok(Mebibytes(256)));
        assert_eq!(parse_memory("2G"), Ok(Mebibytes(2048)));
        for text in ["", "M", "two", "1.5G", "99999999G"] {
            assert!(parse_memory(text).is_err(), "{text:?}");
        }
    }
}
