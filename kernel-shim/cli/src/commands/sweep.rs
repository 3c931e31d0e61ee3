//! `teardown sweep`: what batch sizes cost, and what else they change.

use core::time::Duration;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::commands::options::Format;
use crate::commands::outcome::{CommandError, CommandVerdict, cannot_write, output_file, read_layout};
use crate::input::bundled::LAYOUTS;
use crate::input::layout::Layout;
use crate::output::file::OutputFile;
use crate::output::progress::progress_bar;
use crate::sweep::axes::{Arrangement, Batch, Ceiling, Conditions, CpuMix, NrPages, Refuse};
use crate::sweep::captured_process::CapturedProcess;
use crate::sweep::measure::{MeasureError, SweepPlan, measure};
use crate::sweep::report::SweepReport;

/// The flags of `teardown sweep`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SweepArgs {
    /// Settings to compare: 8 (the slots on the stack alone), 9 to 510 (slots in one batch page),
    /// PAGESxSLOTS such as 19x510 (the default of the engine), unlimited, or adaptive (as many
    /// slots as the pages need). Default: nine of them.
    #[arg(long, value_name = "SETTING,..", value_delimiter = ',')]
    pub batch: Vec<Batch>,
    /// Numbers of pages to tear down, such as 33,513,32Ki.
    #[arg(long, value_name = "PAGES,..", value_delimiter = ',')]
    pub size: Vec<NrPages>,
    /// How the pages lie: dense (W1 of the benches), sparse (W3), areas (W4), huge (W5), shuffled
    /// (W6), or as in a bundled process such as redis-server, which has a size of its own.
    #[arg(long, value_name = "SHAPE,..", value_delimiter = ',')]
    pub shape: Vec<Arrangement>,
    /// Layout file of `teardown capture`, as one more --shape; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub layout: Vec<PathBuf>,
    /// CPUs that have the address space loaded: 2 is two that run it, 8lazy6 is eight of which six
    /// are lazy; with 1 no other CPU is online.
    #[arg(long, value_name = "CPUS,..", value_delimiter = ',')]
    pub cpus: Vec<CpuMix>,
    /// Most pages that a flush invalidates one by one, such as 0,33,never; with never, no flush
    /// drops a whole context.
    #[arg(long, value_name = "PAGES,..", value_delimiter = ',')]
    pub ceiling: Vec<Ceiling>,
    /// Which requests for a batch page are refused: never, always, or N for every N-th.
    #[arg(long, value_name = "WHICH,..", value_delimiter = ',')]
    pub refuse: Vec<Refuse>,
    /// Measures every value of every axis with every other: 2475 sets of conditions, which takes
    /// minutes.
    #[arg(long, conflicts_with_all = ["size", "shape", "layout", "cpus", "ceiling", "refuse"])]
    pub everything: bool,
    /// Timed samples of each setting; with 0 there are only counts, which are the same in every
    /// run.
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(0..=1001))]
    pub repeat: u32,
    /// Stops timing after this many seconds, once there are three samples of each setting.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub time: u64,
    /// Modelled cost of an interrupt to another CPU, in nanoseconds; it is not measured.
    #[arg(long, value_name = "NS", default_value_t = 1000)]
    pub ipi_ns: u32,
    /// Writes a line of CSV for each setting under each set of conditions.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Writes all results as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Writes a page with the answer in words, and charts.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

impl SweepArgs {
    /// What these arguments ask for.
    fn plan(&self) -> Result<SweepPlan, CommandError> {
        let batches = if self.batch.is_empty() { Batch::ALL.to_vec() } else { unique(&self.batch) };
        let mut shapes = unique(&self.shape);
        let mut processes = Vec::new();
        for path in &self.layout {
            let layout = read_layout(path)?;
            let name = name_for(path, &processes);
            processes.push(CapturedProcess { name, layout });
            shapes.push(Arrangement::Process(name));
        }
        let nothing_named = self.size.is_empty()
            && shapes.is_empty()
            && self.cpus.is_empty()
            && self.ceiling.is_empty()
            && self.refuse.is_empty();
        let mut conditions = if self.everything {
            product(&Arrangement::ALL, &NrPages::ALL, &CpuMix::ALL, &Ceiling::ALL, &Refuse::ALL)
        } else if nothing_named {
            one_at_a_time()
        } else {
            let base = Conditions::BASE;
            product(
                &named_or_base(&shapes, base.shape),
                &named_or_base(&self.size, base.size),
                &named_or_base(&self.cpus, base.cpus),
                &named_or_base(&self.ceiling, base.ceiling),
                &named_or_base(&self.refuse, base.refuse),
            )
        };
        for conditions in &mut conditions {
            let Arrangement::Process(name) = conditions.shape else { continue };
            if !processes.iter().any(|process| process.name == name) {
                let bundled = LAYOUTS.iter().find(|bundled| bundled.name == name);
                let text = bundled.map_or("", |bundled| bundled.text);
                let layout = Layout::parse(name, text).map_err(|error| error.to_string())?;
                processes.push(CapturedProcess { name, layout });
            }
            let pages = processes.iter().find(|process| process.name == name).map(CapturedProcess::nr_pages);
            conditions.size = NrPages(pages.unwrap_or_default());
        }
        let conditions = unique(&conditions);
        Ok(SweepPlan {
            batches,
            conditions,
            processes,
            repeat: self.repeat,
            patience: Duration::from_secs(self.time),
        })
    }
}

pub(crate) fn execute(args: &SweepArgs) -> Result<CommandVerdict, CommandError> {
    let plan = args.plan()?;
    // Files are opened first: a sweep whose result cannot be written need not begin.
    let [csv, json, html] =
        [&args.csv, &args.json, &args.html].map(|path| path.as_deref().map(create).transpose());
    let (csv, json, html) = (csv?, json?, html?);
    let progress = progress_bar(plan.steps());
    let measured = measure(&plan, || progress.inc(1));
    progress.finish_and_clear();
    let measurements = match measured {
        Ok(measurements) => measurements,
        Err(error @ MeasureError::Lost { .. }) => {
            let _ = writeln!(io::stderr(), "teardown: {error}");
            return Ok(CommandVerdict::Violation);
        }
        Err(error) => return Err(error.to_string()),
    };
    if let (true, Some(first)) = (measurements.cells.is_empty(), measurements.left_out.first()) {
        return Err(format!("the machine does not have enough frames: {first}"));
    }
    let report = SweepReport::new(measurements, args.ipi_ns);
    if let Some((path, file)) = csv {
        file.write(|out| report.write_csv(out)).map_err(|error| cannot_write(path, &error))?;
    }
    if let Some((path, file)) = json {
        file.write(|out| report.write_json(out)).map_err(|error| cannot_write(path, &error))?;
    }
    if let Some((path, file)) = html {
        file.write(|out| report.write_html(out)).map_err(|error| cannot_write(path, &error))?;
    }
    let out = BufWriter::new(io::stdout().lock());
    let written = match args.format {
        Format::Text => report.write_text(out),
        Format::Json => report.write_json(out),
    };
    written.map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(CommandVerdict::Good)
}

/// A file to be written, with its name.
fn create(path: &Path) -> Result<(&Path, OutputFile), CommandError> {
    Ok((path, output_file(path)?))
}

/// A unique name for the layout in the file at `path`, without letters that mean something in CSV
/// or HTML. The name lives as long as the command, because conditions are copied and name their
/// layout.
fn name_for(path: &Path, taken: &[CapturedProcess]) -> &'static str {
    let stem = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
    let plain = |letter: char| letter.is_alphanumeric() || "-_.".contains(letter);
    let stem: String = stem.chars().map(|letter| if plain(letter) { letter } else { '_' }).collect();
    let mut name = stem.clone();
    let mut number = 2;
    while taken.iter().any(|process| process.name == name) {
        name = format!("{stem}-{number}");
        number += 1;
    }
    Box::leak(name.into_boxed_str())
}

fn named_or_base<T: Copy + PartialEq>(named: &[T], base: T) -> Vec<T> {
    if named.is_empty() { vec![base] } else { unique(named) }
}

/// The values without repetitions, in the order in which they first appear.
fn unique<T: Copy + PartialEq>(values: &[T]) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(value) {
            seen.push(*value);
        }
    }
    seen
}

/// Of the bundled processes: many small areas, many tables, and 2 MiB leaves among the rest.
const PROCESSES: [&str; 3] = ["postgres-backend", "chromium-renderer", "jvm-g1-thp"];

/// The base, and from there each axis alone.
fn one_at_a_time() -> Vec<Conditions> {
    let base = Conditions::BASE;
    let mut all = vec![base];
    all.extend(Arrangement::ALL.map(|shape| Conditions { shape, ..base }));
    all.extend(PROCESSES.map(|name| Conditions { shape: Arrangement::Process(name), ..base }));
    all.extend(NrPages::ALL.map(|size| Conditions { size, ..base }));
    all.extend(CpuMix::ALL.map(|cpus| Conditions { cpus, ..base }));
    all.extend(Ceiling::ALL.map(|ceiling| Conditions { ceiling, ..base }));
    all.extend(Refuse::ALL.map(|refuse| Conditions { refuse, ..base }));
    unique(&all)
}

fn product(
    shapes: &[Arrangement],
    sizes: &[NrPages],
    cpu_mixes: &[CpuMix],
    ceilings: &[Ceiling],
    refusals: &[Refuse],
) -> Vec<Conditions> {
    let mut all = Vec::new();
    for shape in shapes {
        for size in sizes {
            for cpus in cpu_mixes {
                for ceiling in ceilings {
                    for refuse in refusals {
                        let (shape, size, cpus) = (*shape, *size, *cpus);
                        all.push(Conditions { shape, size, cpus, ceiling: *ceiling, refuse: *refuse });
                    }
                }
            }
        }
    }
    all
}
