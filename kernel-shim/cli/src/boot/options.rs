//! What can be asked of the image: its workloads, the faults planted in it, how QEMU runs it.

use core::fmt;

use clap::ValueEnum;

/// What the image does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Everything below: more than 100,000 pages, 1,000 shootdowns and 100 exits on four CPUs.
    Full,
    /// The same, in a few seconds.
    Short,
    /// Threads use memory that another CPU takes away.
    Threads,
    /// Processes come and go on every CPU.
    Churn,
    /// CPUs stay with an address space without running it, while its pages and tables go.
    Lazy,
    /// A fixed piece of work, whose counts are compared with those of the hosted machine.
    Drill,
    /// What instructions, flushes and interrupts cost, in emulated cycles.
    Measure,
    /// The layout that --layout names, compared as well.
    Layout,
    /// The hardware half alone, without the kernel.
    SelfTest,
    /// Hangs, to show how that ends.
    Hang,
    /// Panics, to show how that ends.
    Panic,
}

impl Workload {
    /// The parts that the image must have done, in order, before a run without a violation means anything.
    pub(crate) const fn phases(self, fault: Option<BootFault>) -> &'static [&'static str] {
        match (self, fault) {
            (Self::Full | Self::Short, None) => &["drill", "threads", "churn", "lazy", "measure"],
            (Self::Full | Self::Short, Some(_)) => &["threads", "churn", "lazy", "measure"],
            (Self::Threads, _) => &["threads"],
            (Self::Churn, _) => &["churn"],
            (Self::Lazy, _) => &["lazy"],
            (Self::Drill, _) => &["drill"],
            (Self::Measure, _) => &["measure"],
            (Self::Layout, _) => &["layout"],
            (Self::SelfTest | Self::Hang | Self::Panic, _) => &[],
        }
    }

    /// Whether CPUs tell others to flush in any run of it, where there are others. Processes that come and go, each on one CPU, need
    /// not, and without a kernel nobody does.
    pub(crate) const fn shoots_down(self) -> bool {
        !matches!(self, Self::Churn | Self::SelfTest | Self::Hang | Self::Panic)
    }
}

/// What goes wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(clippy::enum_variant_names, reason = "the words on the command line")]
pub enum BootFault {
    /// A CPU that unmaps does not flush itself.
    SkipLocalFlush,
    /// A CPU that is told to flush does not.
    SkipRemoteFlush,
    /// Pages are freed when their entries are cleared.
    FreeBeforeFlush,
}

impl BootFault {
    /// Whether what it does harms a program there that looks. Where nobody reads what another CPU has taken away, or programs
    /// only read, the image would end without a violation, and be taken for blind.
    pub(crate) const fn shows_in(self, workload: Workload) -> bool {
        match workload {
            Workload::Full | Workload::Short | Workload::Threads => true,
            Workload::Lazy => matches!(self, Self::SkipRemoteFlush),
            _ => false,
        }
    }
}

/// How QEMU runs the CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// In software, one host thread a CPU.
    Tcg,
    /// In hardware, by Linux's KVM.
    Kvm,
}

/// A size of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mebibytes(pub u64);

/// The name on the command line, and in the image.
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
