//! Which setting to take, and why: computed from what a sweep measured.

use serde::Serialize;

use crate::output::bytes::bytes;
use crate::output::words::counted;
use crate::sweep::axes::{Batch, Conditions};
use crate::sweep::measure::Measured;

/// A setting counts as cheap if it costs, on average, no more than this many times the cheapest.
const GOOD_ENOUGH: f64 = 1.05;
/// Costs of an interrupt, in nanoseconds, for each of which a choice is given.
const IPI_COSTS: [u32; 5] = [0, 250, 1000, 4000, 10_000];

/// A choice among the settings.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Answer {
    /// What was chosen.
    pub(crate) choice: Batch,
    /// The conditions under which memory is compared.
    pub(crate) memory_at: Conditions,
    /// Sets of conditions under which the setting changes the number of flushes.
    pub(crate) considered: usize,
    /// Sets of conditions in all.
    pub(crate) conditions: usize,
    /// What it was chosen from.
    pub(crate) settings: Vec<Setting>,
    /// The choice for other costs of an interrupt.
    pub(crate) by_ipi_ns: Vec<ByIpi>,
    ipi_ns: u32,
}

/// How one setting did.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Setting {
    pub(crate) batch: Batch,
    /// Cost as a multiple of the cheapest setting's, geometric mean over the conditions considered.
    pub(crate) mean_ratio: f64,
    /// The same at the worst.
    pub(crate) worst_ratio: f64,
    /// Where that is.
    pub(crate) worst_at: Conditions,
    /// Bytes unfreed at the peak, under the conditions named in the answer.
    pub(crate) bytes_unfreed_peak: u64,
    /// Flushes there.
    pub(crate) flushes: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ByIpi {
    pub(crate) ipi_ns: u32,
    pub(crate) choice: Batch,
}

/// Measured nanoseconds a page, and `ipi_ns` for each interrupt sent: a model, and a simple one.
pub(crate) fn modelled_ns(cell: &Measured, ipi_ns: u32) -> Option<f64> {
    let per_page = f64::from(ipi_ns) * cell.counts.ipis_per_1000_pages() / 1000.0;
    Some(cell.measured?.ns_per_page_median + per_page)
}

impl Answer {
    /// The answer; none if there is nothing to choose from, or nothing was timed.
    pub(crate) fn new(cells: &[Measured], ipi_ns: u32) -> Option<Self> {
        let groups = groups(cells);
        let mut considered: Vec<&[Measured]> =
            groups.iter().copied().filter(|group| matters(group)).collect();
        // Memory is compared at the base of the default sweep, or else where most pages go.
        let base = considered.iter().position(|group| group[0].conditions == Conditions::BASE);
        let largest = (0..considered.len()).rev().max_by_key(|index| considered[*index][0].conditions.size);
        considered.swap(0, base.or(largest)?);
        let memory_at = considered.first()?.first()?.conditions;
        let (settings, choice) = choose(&considered, ipi_ns)?;
        let by_ipi_ns = IPI_COSTS
            .iter()
            .filter_map(|ipi_ns| {
                let (_, choice) = choose(&considered, *ipi_ns)?;
                Some(ByIpi { ipi_ns: *ipi_ns, choice })
            })
            .collect();
        Some(Self {
            choice,
            memory_at,
            considered: considered.len(),
            conditions: groups.len(),
            settings,
            by_ipi_ns,
            ipi_ns,
        })
    }

    /// In words, a sentence or two each.
    pub(crate) fn words(&self) -> Vec<String> {
        let find = |batch: Batch| self.settings.iter().find(|setting| setting.batch == batch);
        let Some(chosen) = find(self.choice) else { return Vec::new() };
        let mut words = vec![format!(
            "Take {} ({}): among the settings that cost at most {GOOD_ENOUGH} times as much as the cheapest, it keeps the \
             least memory waiting.",
            self.choice,
            self.choice.in_code()
        )];
        words.push(format!(
            "It costs {:.2} times as much as the cheapest: the geometric mean over {} of {}, those in which the setting \
             changes the number of flushes. At worst it costs {:.2} times as much: {}. An interrupt is modelled as {} ns. \
             At the peak {} wait unfreed, with {} ({}).",
            chosen.mean_ratio,
            self.considered,
            counted(self.conditions as u64, "set of conditions", "sets of conditions"),
            chosen.worst_ratio,
            chosen.worst_at,
            self.ipi_ns,
            bytes(chosen.bytes_unfreed_peak),
            counted(chosen.flushes, "flush", "flushes"),
            self.memory_at,
        ));
        let others = self.settings.iter().filter(|setting| setting.batch != self.choice);
        if let Some(cheapest) = others.clone().min_by(|a, b| a.mean_ratio.total_cmp(&b.mean_ratio)) {
            words.push(format!(
                "The cheapest of the others is {}: {:.2} times as much as the cheapest of all, {} unfreed.",
                cheapest.batch,
                cheapest.mean_ratio,
                bytes(cheapest.bytes_unfreed_peak)
            ));
        }
        if let Some(worst) = others.max_by(|a, b| a.mean_ratio.total_cmp(&b.mean_ratio)) {
            words.push(format!(
                "The most expensive is {}: {:.2} times as much.",
                worst.batch, worst.mean_ratio
            ));
        }
        let choices: Vec<String> =
            self.by_ipi_ns.iter().map(|by| format!("{} at {} ns", by.choice, by.ipi_ns)).collect();
        words.push(format!("The choice depends on what an interrupt costs: {}.", choices.join(", ")));
        words
    }
}

/// The cells of each set of conditions; they lie side by side.
pub(crate) fn groups(cells: &[Measured]) -> Vec<&[Measured]> {
    cells.chunk_by(|a, b| a.conditions == b.conditions).collect()
}

/// Whether the settings differ in how often they flush.
fn matters(group: &[Measured]) -> bool {
    group.iter().any(|cell| cell.counts.flushes != group[0].counts.flushes)
}

/// How the settings did, and which is chosen; memory is that of the first group.
fn choose(groups: &[&[Measured]], ipi_ns: u32) -> Option<(Vec<Setting>, Batch)> {
    let lead = groups.first()?;
    let mut settings = Vec::new();
    for cell in *lead {
        let mut logarithms = 0.0;
        let mut worst = (0.0, cell.conditions);
        for group in groups {
            let cheapest =
                group.iter().filter_map(|cell| modelled_ns(cell, ipi_ns)).min_by(f64::total_cmp)?;
            let mine = group.iter().find(|other| other.batch == cell.batch)?;
            // On a coarse clock a sample can be 0.
            let ratio = modelled_ns(mine, ipi_ns)?.max(0.01) / cheapest.max(0.01);
            logarithms += ratio.ln();
            if ratio > worst.0 {
                worst = (ratio, mine.conditions);
            }
        }
        settings.push(Setting {
            batch: cell.batch,
            mean_ratio: (logarithms / groups.len() as f64).exp(),
            worst_ratio: worst.0,
            worst_at: worst.1,
            bytes_unfreed_peak: cell.counts.bytes_unfreed_peak,
            flushes: cell.counts.flushes,
        });
    }
    let least = settings.iter().map(|setting| setting.mean_ratio).min_by(f64::total_cmp)?;
    let choice = settings
        .iter()
        .filter(|setting| setting.mean_ratio <= least * GOOD_ENOUGH)
        .min_by_key(|setting| setting.bytes_unfreed_peak)?
        .batch;
    Some((settings, choice))
}
