//! A layout as a plan that any machine can build, cut to the memory there is; and the same work on
//! the hosted machine, to compare what both count.

use core::fmt::Write;

use mmu_adapter::HostedStage;
use mmu_gather::tlb::PcidSupport;
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{AreaKind, Config, PageContent, Protection, Snapshot, Stage, drill, plan};

use crate::input::layout::{HUGE_PAGES, Layout, LayoutVma, PAGE_BYTES, PageState, VmaKind};
use crate::run::hosted_process::frames_needed;
use crate::run::kernel_terms::{DirtyPages, FileNumbers, page_content, protection};

/// Frames that the drill needs, with some to spare.
const DRILL_FRAMES: u64 = 16_384;

/// A layout in the form that `mmu_kernel_shim::plan` reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutPlan {
    /// The text.
    pub text: String,
    /// Name of the layout.
    pub name: String,
    /// Base pages present in the layout.
    pub nr_pages: u64,
    /// Base pages present in the plan: fewer, if memory does not hold all.
    pub nr_planned: u64,
    /// Areas.
    pub nr_areas: u64,
    /// Frames a machine needs for it.
    nr_frames: u64,
}

impl LayoutPlan {
    /// Writes `layout` down, as far as `nr_frames` frames hold it.
    #[must_use]
    pub fn new(layout: &Layout, nr_frames: u64) -> Self {
        let totals = layout.totals();
        // Frames that are not for these pages: those of tables, and some for page faults.
        let overhead = frames_needed(layout) - totals.nr_resident() - totals.nr_zero - totals.nr_swap;
        let mut planner = Planner {
            text: String::new(),
            files: FileNumbers::default(),
            frames_left: nr_frames.saturating_sub(overhead),
            nr_planned: 0,
        };
        for vma in &layout.vmas {
            planner.add_area(vma);
        }
        Self {
            text: planner.text,
            name: layout.name.clone(),
            nr_pages: totals.nr_present(),
            nr_planned: planner.nr_planned,
            nr_areas: totals.nr_vmas,
            nr_frames: frames_needed(layout),
        }
    }

    /// What the hosted machine counts for it.
    ///
    /// # Errors
    /// Why it could not be run there.
    pub fn count_hosted(&self, nr_cpus: u32, pcid: PcidSupport) -> Result<Snapshot, String> {
        let stage = hosted(nr_cpus, self.nr_frames, pcid)?;
        let planned = plan::build(stage.kernel(), &self.text).map_err(|error| error.to_string())?;
        plan::take_down(&stage, &planned).map_err(|error| error.to_string())
    }
}

/// What the hosted machine counts in the drill.
///
/// # Errors
/// Why it could not be run there.
pub fn count_drill_hosted(nr_cpus: u32, pcid: PcidSupport) -> Result<Snapshot, String> {
    drill(&hosted(nr_cpus, DRILL_FRAMES, pcid)?).map_err(|error| error.to_string())
}

fn hosted(nr_cpus: u32, nr_frames: u64, pcid: PcidSupport) -> Result<HostedStage, String> {
    let options = Options { pcid, ..Options::new(nr_cpus, nr_frames, 1) };
    let machine = HostedMachine::new(options).map_err(|error| error.to_string())?;
    HostedStage::boot(machine, Config::default()).map_err(|error| error.to_string())
}

/// A plan being written.
struct Planner {
    text: String,
    files: FileNumbers,
    frames_left: u64,
    nr_planned: u64,
}

impl Planner {
    fn add_area(&mut self, vma: &LayoutVma) {
        let rights = match protection(vma.prot) {
            Protection::Write => "w",
            Protection::Read => "r",
            Protection::Execute => "x",
            Protection::Nothing => "-",
        };
        let backing = match self.files.area_kind(vma) {
            AreaKind::Anon => "anon".to_owned(),
            AreaKind::Pfn => "pfn".to_owned(),
            AreaKind::FilePrivate(file) => format!("private:{file}"),
            AreaKind::FileShared(file) => format!("shared:{file}"),
        };
        let grows = if vma.kind == VmaKind::Stack { " grows" } else { "" };
        self.write_line(format_args!("area {:x}-{:x} {rights} {backing}{grows}", vma.start, vma.end));
        let mut dirty = DirtyPages::of_area(vma);
        for run in &vma.runs {
            let start = vma.address_of(run);
            let nr_pages = self.affordable(run.state, run.nr_pages);
            let nr_dirty = dirty.take(run.state, nr_pages);
            self.write_fill(start, nr_dirty, PageContent::FileDirty);
            self.write_fill(start + nr_dirty * PAGE_BYTES, nr_pages - nr_dirty, page_content(run.state));
        }
    }

    fn write_fill(&mut self, start: u64, nr_pages: u64, content: PageContent) {
        if nr_pages == 0 {
            return;
        }
        let end = start + nr_pages * PAGE_BYTES;
        self.write_line(format_args!("fill {start:x}-{end:x} {}", content.word()));
        if content != PageContent::Swap {
            self.nr_planned += nr_pages;
        }
    }

    /// How many of `nr_pages` pages in this state still fit into memory; takes their frames.
    fn affordable(&mut self, state: PageState, nr_pages: u64) -> u64 {
        let step = if state.is_huge() { HUGE_PAGES } else { 1 };
        let takes_frames = match state {
            PageState::Anon | PageState::File | PageState::AnonHuge | PageState::FileHuge => true,
            PageState::Zero | PageState::Pfn | PageState::ZeroHuge | PageState::Swap => false,
        };
        if !takes_frames {
            return nr_pages;
        }
        let nr_pages = nr_pages.min(self.frames_left / step * step);
        self.frames_left -= nr_pages;
        nr_pages
    }

    fn write_line(&mut self, line: core::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::bundled::LAYOUTS;

    fn layout(name: &str) -> Layout {
        let bundled = LAYOUTS.iter().find(|bundled| bundled.name == name).expect("it is bundled");
        Layout::parse(name, bundled.text).expect("a good layout")
    }

    #[test]
    fn a_plan_holds_every_page_if_memory_does() {
        let layout = layout("python-pandas");
        let plan = LayoutPlan::new(&layout, frames_needed(&layout));
        assert_eq!(plan.nr_planned, plan.nr_pages);
        assert_eq!(plan.nr_pages, layout.totals().nr_present());
        let counted = plan.count_hosted(2, PcidSupport::Off).expect("the plan is good");
        assert_eq!(counted.double_frees, 0);
        assert!(counted.pte_tables > 0 && counted.ipis_sent > 0);
    }

    #[test]
    fn a_plan_is_cut_to_the_memory_there_is() {
        let layout = layout("redis-server");
        let half = frames_needed(&layout) / 2;
        let plan = LayoutPlan::new(&layout, half);
        assert!(plan.nr_planned < half && plan.nr_planned > half / 2, "{} of {half}", plan.nr_planned);
        assert_eq!(LayoutPlan::new(&layout, 0).nr_areas, layout.totals().nr_vmas);
    }
}
