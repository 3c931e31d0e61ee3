//! The memory of a real process as something a sweep tears down.

use mmu_gather::pagetable::{Level, VirtRange};
use mmu_measured::memory::{DATA_BYTES, Memory};
use mmu_measured::shape::{Leaf, Shape, Workload};

use crate::input::layout::{HUGE_PAGES, Layout, PAGE_BYTES, PageState};

const BLOCK_BYTES: u64 = HUGE_PAGES * PAGE_BYTES;

/// A captured process.
#[derive(Clone, Debug)]
pub(crate) struct CapturedProcess {
    /// Its name; it stays in memory as long as the command runs.
    pub name: &'static str,
    /// What it had mapped.
    pub layout: Layout,
}

impl CapturedProcess {
    /// Leaves with a frame to give back: pages of memory and of files, 4 KiB or 2 MiB. What is left
    /// out needs no batch: the page of zeroes, frames of devices, places in swap.
    #[must_use]
    pub(crate) fn nr_pages(&self) -> u64 {
        let runs = self.layout.vmas.iter().flat_map(|vma| &vma.runs);
        let leaves = runs.map(|run| match run.state {
            PageState::Anon | PageState::File => run.nr_pages,
            PageState::AnonHuge | PageState::FileHuge => run.nr_pages / HUGE_PAGES,
            _ => 0,
        });
        leaves.sum()
    }

    /// Its areas and leaves, with frames in the order of the addresses; `None` if there are not
    /// enough frames.
    pub(crate) fn shape(&self) -> Option<Shape> {
        // The nearest of the workloads: areas with pages here and there.
        let mut shape = Shape::empty(Workload::W4Areas, Level::Pte);
        for vma in &self.layout.vmas {
            shape.areas.push(VirtRange::new(vma.start, vma.end).ok()?);
            for run in &vma.runs {
                let start = vma.start + run.first_page * PAGE_BYTES;
                let end = start + run.nr_pages * PAGE_BYTES;
                let (leaves, bytes) = match run.state {
                    PageState::Anon | PageState::File => (&mut shape.leaves, PAGE_BYTES),
                    PageState::AnonHuge | PageState::FileHuge => (&mut shape.blocks, BLOCK_BYTES),
                    _ => continue,
                };
                let mut address = start;
                while address < end {
                    leaves.push(Leaf { address, physical: 0 });
                    address += bytes;
                }
            }
        }
        // Blocks first, which must be aligned.
        let mut physical = Memory::data_start();
        for block in &mut shape.blocks {
            block.physical = physical;
            physical += BLOCK_BYTES;
        }
        for leaf in &mut shape.leaves {
            leaf.physical = physical;
            physical += PAGE_BYTES;
        }
        (physical <= Memory::data_start() + DATA_BYTES && shape.nr_leaves() > 0).then_some(shape)
    }
}

/// Bytes of the page whose first frame is at `physical`, in a shape made here or by the benches.
pub(crate) fn page_bytes(shape: &Shape, physical: u64) -> u64 {
    let first_small = Memory::data_start() + shape.blocks.len() as u64 * BLOCK_BYTES;
    if shape.level == Level::Pmd || physical < first_small { BLOCK_BYTES } else { PAGE_BYTES }
}
