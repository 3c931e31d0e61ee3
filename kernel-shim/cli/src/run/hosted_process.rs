//! A process on the hosted machine, built from a layout.

use std::collections::HashMap;
use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{HostedKernel, HostedMachine, Options};
use mmu_kernel_shim::{Area, AreaKind, Growth, Mm, PageContent, Protection, Vma};

use crate::input::layout::{Layout, LayoutVma, PAGE_BYTES, PageState, Sharing, VmaKind};

/// An address space of the hosted kernel.
pub type HostedMm = Mm<Arc<HostedMachine>>;

/// A process whose memory looks like a layout.
#[derive(Debug)]
pub struct HostedProcess {
    /// Its address space.
    pub mm: Arc<HostedMm>,
    /// Its areas, in order.
    pub areas: Vec<VirtRange>,
    /// Where something is mapped, in order.
    pub mapped: Vec<VirtRange>,
}

/// Why a layout could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The kernel refused.
    #[error("layout {name}, area {start:#x}..{end:#x}: {source}")]
    Kernel {
        /// The layout.
        name: String,
        /// The area.
        start: u64,
        /// Its end.
        end: u64,
        /// What it said.
        source: mmu_kernel_shim::Error,
    },
    /// The host refused memory.
    #[error("cannot reserve memory for the machine: {0}")]
    Memory(#[from] std::io::Error),
    /// The numbers of an area are no range.
    #[error("layout {name}: {source}")]
    Range {
        /// The layout.
        name: String,
        /// What is wrong.
        source: mmu_gather::pagetable::RangeError,
    },
}

/// Frames a machine needs for a layout: its pages, its tables, and some to fault in.
#[must_use]
pub fn frames_needed(layout: &Layout) -> u64 {
    let totals = layout.totals();
    let pages = totals.nr_resident() + totals.nr_zero + totals.nr_swap;
    // A table a run at most, and its parents; a run of n pages needs n/512 more.
    let tables = 2 * totals.nr_runs + 4 * totals.nr_vmas + pages / 256;
    Options::RESERVED_FRAMES + pages + tables + 8192
}

impl HostedProcess {
    /// Builds `layout` in `kernel`.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn build(kernel: &HostedKernel, layout: &Layout) -> Result<Self, BuildError> {
        let mut builder = Builder { kernel, layout, files: HashMap::new() };
        let mm = kernel.new_mm().map_err(|source| builder.kernel_error(0, 0, source))?;
        let mut process = Self { mm, areas: Vec::new(), mapped: Vec::new() };
        for vma in &layout.vmas {
            builder.add_area(&mut process, vma)?;
        }
        Ok(process)
    }
}

struct Builder<'a> {
    kernel: &'a HostedKernel,
    layout: &'a Layout,
    files: HashMap<String, u32>,
}

impl Builder<'_> {
    fn add_area(&mut self, process: &mut HostedProcess, vma: &LayoutVma) -> Result<(), BuildError> {
        let range = self.range(vma.start, vma.end)?;
        let area = Area {
            kind: self.kind(vma),
            protection: match (vma.prot.read || vma.prot.exec, vma.prot.write) {
                (_, true) => Protection::Write,
                (true, false) => Protection::Read,
                (false, false) => Protection::Nothing,
            },
            growth: if vma.kind == VmaKind::Stack { Growth::Down } else { Growth::Fixed },
            // Each mapping of a file begins at a place of its own: the layout does not say where.
            file_base: 0,
        };
        let map = self.kernel.mmap(&process.mm, Vma { range, area });
        map.map_err(|source| self.kernel_error(vma.start, vma.end, source))?;
        process.areas.push(range);
        let mut dirty = if vma.sharing == Sharing::Shared { vma.nr_dirty.unwrap_or(0) } else { 0 };
        for run in &vma.runs {
            let start = vma.address_of(run);
            let content = match run.state {
                PageState::Anon => PageContent::Anon,
                PageState::File => PageContent::File,
                PageState::Zero => PageContent::Zero,
                PageState::Pfn => PageContent::Pfn,
                PageState::AnonHuge => PageContent::AnonBlock,
                PageState::FileHuge => PageContent::FileBlock,
                PageState::ZeroHuge => PageContent::ZeroBlock,
                PageState::Swap => PageContent::Swap,
            };
            let written = if run.state == PageState::File { dirty.min(run.nr_pages) } else { 0 };
            dirty -= written;
            let parts = [(0, written, PageContent::FileDirty), (written, run.nr_pages, content)];
            for (from, to, content) in parts.into_iter().filter(|(from, to, _)| from < to) {
                let part = self.range(start + from * PAGE_BYTES, start + to * PAGE_BYTES)?;
                let filled = self.kernel.populate(&process.mm, part, content);
                filled.map_err(|source| self.kernel_error(vma.start, vma.end, source))?;
            }
            process.mapped.push(self.range(start, start + run.nr_pages * PAGE_BYTES)?);
        }
        Ok(())
    }

    fn kind(&mut self, vma: &LayoutVma) -> AreaKind {
        let name = match &vma.kind {
            VmaKind::Anon | VmaKind::Heap | VmaKind::Stack => return AreaKind::Anon,
            VmaKind::Pfn(_) => return AreaKind::Pfn,
            VmaKind::File(name) | VmaKind::Shared(name) | VmaKind::HugeTlb(name) => name,
        };
        // At most one id an area, far below 2^32.
        let next = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
        let file = *self.files.entry(name.clone()).or_insert(next);
        match vma.sharing {
            Sharing::Private => AreaKind::FilePrivate(file),
            Sharing::Shared => AreaKind::FileShared(file),
        }
    }

    fn range(&self, start: u64, end: u64) -> Result<VirtRange, BuildError> {
        VirtRange::new(start, end)
            .map_err(|source| BuildError::Range { name: self.layout.name.clone(), source })
    }

    fn kernel_error(&self, start: u64, end: u64, source: mmu_kernel_shim::Error) -> BuildError {
        BuildError::Kernel { name: self.layout.name.clone(), start, end, source }
    }
}
