//! A process on the hosted machine, built from a layout.

use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::Options;
use mmu_kernel_shim::{Area, Growth, PageContent, Vma};

use crate::input::layout::{Layout, LayoutVma, PAGE_BYTES, VmaKind};
use crate::run::kernel_terms::{DirtyPages, FileNumbers, page_content, protection};

/// A process whose memory looks like a layout.
#[derive(Debug)]
pub(crate) struct HostedProcess {
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
pub(crate) fn frames_needed(layout: &Layout) -> u64 {
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
    pub(crate) fn build(kernel: &HostedKernel, layout: &Layout) -> Result<Self, BuildError> {
        let mut builder = Builder { kernel, layout, files: FileNumbers::default() };
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
    files: FileNumbers,
}

impl Builder<'_> {
    fn add_area(&mut self, process: &mut HostedProcess, vma: &LayoutVma) -> Result<(), BuildError> {
        let range = self.range(vma.start, vma.end)?;
        let area = Area {
            kind: self.files.area_kind(vma),
            protection: protection(vma.prot),
            growth: if vma.kind == VmaKind::Stack { Growth::Down } else { Growth::Fixed },
            // Each mapping of a file begins at a place of its own: the layout does not say where.
            ..Area::anon()
        };
        let map = self.kernel.mmap(&process.mm, Vma { range, area });
        map.map_err(|source| self.kernel_error(vma.start, vma.end, source))?;
        process.areas.push(range);
        let mut dirty = DirtyPages::of_area(vma);
        for run in &vma.runs {
            let start = vma.address_of(run);
            let (nr_dirty, content) = (dirty.take(run.state, run.nr_pages), page_content(run.state));
            let parts = [(0, nr_dirty, PageContent::FileDirty), (nr_dirty, run.nr_pages, content)];
            for (from, to, content) in parts.into_iter().filter(|(from, to, _)| from < to) {
                let part = self.range(start + from * PAGE_BYTES, start + to * PAGE_BYTES)?;
                let filled = self.kernel.populate(&process.mm, part, content);
                filled.map_err(|source| self.kernel_error(vma.start, vma.end, source))?;
            }
            process.mapped.push(self.range(start, start + run.nr_pages * PAGE_BYTES)?);
        }
        Ok(())
    }

    fn range(&self, start: u64, end: u64) -> Result<VirtRange, BuildError> {
        VirtRange::new(start, end)
            .map_err(|source| BuildError::Range { name: self.layout.name.clone(), source })
    }

    fn kernel_error(&self, start: u64, end: u64, source: mmu_kernel_shim::Error) -> BuildError {
        BuildError::Kernel { name: self.layout.name.clone(), start, end, source }
    }
}
