//! One line chart as SVG: settings along the bottom, a line for each series, colours left to the
//! page's style sheet.

use core::fmt::Write as _;

use crate::output::bytes::bytes;

/// Series that look different; more begin again, with hollow marks.
pub(crate) const STYLES: usize = 8;
const DASHES: [&str; STYLES] = ["", "8 4", "2 4", "9 3 2 3", "14 4", "4 4", "9 3 2 3 2 3", "1 3"];

const WIDTH: f64 = 620.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const PLOT_HEIGHT: f64 = 220.0;
/// About what a letter of the labels takes.
const LETTER: f64 = 6.0;

/// What an axis counts, and how its numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Anything but bytes.
    Number,
    /// Bytes, in powers of two.
    Bytes,
}

/// What is drawn.
#[derive(Debug)]
pub(crate) struct Chart<'a> {
    pub(crate) x_name: &'a str,
    pub(crate) y_name: &'a str,
    pub(crate) unit: Unit,
    /// Along the bottom.
    pub(crate) places: &'a [Place],
    pub(crate) series: &'a [Series],
}

/// One setting along the bottom.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) label: String,
    /// Whether the line goes on to here; a setting that is not one more step stands alone.
    pub(crate) joined: bool,
    /// Whether it is to be seen at once.
    pub(crate) chosen: bool,
}

/// One line; a value for each place.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) values: Vec<Option<f64>>,
}

impl Chart<'_> {
    /// The drawing.
    pub(crate) fn svg(&self) -> String {
        let scale = Scale::new(
            self.series.iter().flat_map(|series| series.values.iter().flatten().copied()),
            self.unit,
        );
        let widest = self.places.iter().map(|place| place.label.len()).max().unwrap_or(0) as f64 * LETTER;
        let slanted = widest > self.slot();
        let below = if slanted { 34.0 + widest * 0.62 } else { 44.0 };
        let height = TOP + PLOT_HEIGHT + below;
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{} against {}\">",
            self.y_name, self.x_name
        );
        self.draw_axes(&mut svg, &scale, slanted, height);
        for (index, series) in self.series.iter().enumerate() {
            self.draw_series(&mut svg, &scale, index, series);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn slot(&self) -> f64 {
        (WIDTH - LEFT - RIGHT) / self.places.len().max(1) as f64
    }

    fn middle_of(&self, place: usize) -> f64 {
        LEFT + self.slot() * (place as f64 + 0.5)
    }

    fn draw_axes(&self, svg: &mut String, scale: &Scale, slanted: bool, height: f64) {
        let bottom = TOP + PLOT_HEIGHT;
        for (place, here) in self.places.iter().enumerate() {
            let x = self.middle_of(place);
            if here.chosen {
                let left = x - self.slot() / 2.0;
                put(
                    svg,
                    format_args!(
                        "<rect class=\"chosen\" x=\"{left:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{PLOT_HEIGHT}\"/>",
                        self.slot()
                    ),
                );
            }
            let y = bottom + 17.0;
            let label = &here.label;
            let class = if here.chosen { " class=\"place strong\"" } else { " class=\"place\"" };
            if slanted {
                put(
                    svg,
                    format_args!(
                        "<text{class} x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"end\" transform=\"rotate(-38 {x:.1} {y:.1})\">{label}</text>"
                    ),
                );
            } else {
                put(
                    svg,
                    format_args!(
                        "<text{class} x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{label}</text>"
                    ),
                );
            }
        }
        for tick in scale.ticks() {
            let y = scale.y(tick);
            put(
                svg,
                format_args!(
                    "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{}</text>",
                    WIDTH - RIGHT,
                    LEFT - 7.0,
                    y + 4.0,
                    self.unit.write(tick)
                ),
            );
        }
        put(
            svg,
            format_args!(
                "<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{:.1}\"/>\
             <text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"name\" x=\"14\" y=\"{:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 14 {:.1})\">{}{}</text>",
                WIDTH - RIGHT,
                f64::midpoint(LEFT, WIDTH - RIGHT),
                height - 6.0,
                self.x_name,
                TOP + PLOT_HEIGHT / 2.0,
                TOP + PLOT_HEIGHT / 2.0,
                self.y_name,
                if scale.is_logarithmic() { " (log)" } else { "" },
            ),
        );
    }

    fn draw_series(&self, svg: &mut String, scale: &Scale, index: usize, series: &Series) {
        let style = index % STYLES;
        // Side by side, so that lines that lie on each other are all seen.
        let apart = (self.slot() * 0.5 / self.series.len() as f64).min(5.0);
        let shift = (index as f64 - (self.series.len() as f64 - 1.0) / 2.0) * apart;
        let mut path = String::new();
        let mut marks = String::new();
        let mut pen = 'M';
        for (place, value) in series.values.iter().enumerate() {
            let (Some(value), Some(here)) = (value, self.places.get(place)) else {
                pen = 'M';
                continue;
            };
            let (x, y) = (self.middle_of(place) + shift, scale.y(*value));
            if here.joined {
                put(&mut path, format_args!("{pen}{x:.1} {y:.1}"));
                pen = 'L';
            }
            let hollow = if index >= STYLES { " hollow" } else { "" };
            put(
                &mut marks,
                format_args!(
                    "<path class=\"mark{hollow}\" d=\"{}\"><title>{}, {}: {} {}</title></path>",
                    mark(style, x, y),
                    series.name,
                    here.label,
                    self.y_name,
                    self.unit.write_exactly(*value)
                ),
            );
        }
        put(
            svg,
            format_args!(
                "<g class=\"s{index} c{style}\"><path class=\"line\" stroke-dasharray=\"{}\" d=\"{path}\"/>{marks}</g>",
                DASHES[style]
            ),
        );
    }
}

/// A short line with its mark, for the legend.
pub(crate) fn key(index: usize) -> String {
    let style = index % STYLES;
    let hollow = if index >= STYLES { " hollow" } else { "" };
    format!(
        "<svg class=\"key c{style}\" viewBox=\"0 0 44 14\" aria-hidden=\"true\"><path class=\"line\" stroke-dasharray=\"{}\" \
         d=\"M1 7H43\"/><path class=\"mark{hollow}\" d=\"{}\"/></svg>",
        DASHES[style],
        mark(style, 22.0, 7.0)
    )
}

/// The outline of a mark: one shape a style.
fn mark(style: usize, x: f64, y: f64) -> String {
    let polygon = |points: &[(f64, f64)]| {
        let mut path = String::new();
        for (number, (dx, dy)) in points.iter().enumerate() {
            put(
                &mut path,
                format_args!("{}{:.1} {:.1}", if number == 0 { 'M' } else { 'L' }, x + dx, y + dy),
            );
        }
        path + "Z"
    };
    match style {
        0 => format!("M{:.1} {y:.1}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z", x - 4.0),
        1 => polygon(&[(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)]),
        2 => polygon(&[(0.0, -5.0), (4.6, 3.4), (-4.6, 3.4)]),
        3 => polygon(&[(0.0, -5.2), (5.2, 0.0), (0.0, 5.2), (-5.2, 0.0)]),
        4 => polygon(&[(0.0, 5.0), (4.6, -3.4), (-4.6, -3.4)]),
        5 => polygon(&[
            (-1.5, -5.0),
            (1.5, -5.0),
            (1.5, -1.5),
            (5.0, -1.5),
            (5.0, 1.5),
            (1.5, 1.5),
            (1.5, 5.0),
            (-1.5, 5.0),
            (-1.5, 1.5),
            (-5.0, 1.5),
            (-5.0, -1.5),
            (-1.5, -1.5),
        ]),
        6 => polygon(&[(-4.6, 0.0), (-2.3, -4.2), (2.3, -4.2), (4.6, 0.0), (2.3, 4.2), (-2.3, 4.2)]),
        _ => polygon(&[(-5.0, -2.4), (5.0, -2.4), (5.0, 2.4), (-5.0, 2.4)]),
    }
}

fn put(text: &mut String, words: core::fmt::Arguments<'_>) {
    // A string takes everything.
    let _ = text.write_fmt(words);
}

/// Where values lie from bottom to top.
#[derive(Debug)]
enum Scale {
    /// From 0 to this, with ticks this far apart.
    Linear { top: f64, step: f64 },
    /// Between two powers of `base`, a tick every `every` powers; zeros, if there are any, on a
    /// line of their own below.
    Logarithmic { low: i32, high: i32, base: f64, every: i32, zeros: bool },
}

/// Room for zeros below a logarithmic scale.
const ZEROS: f64 = 26.0;

impl Scale {
    fn new(values: impl Iterator<Item = f64> + Clone, unit: Unit) -> Self {
        let most = values.clone().fold(0.0, f64::max);
        let least = values.clone().filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
        if most <= least * 20.0 || most <= 0.0 {
            let step = nice_step(most, unit);
            return Self::Linear { top: (most / step).ceil().max(1.0) * step, step };
        }
        let base: f64 = if unit == Unit::Bytes { 4.0 } else { 10.0 };
        // Some way beyond the power itself counts as the next one, so that no mark lies on the
        // edge.
        #[expect(clippy::cast_possible_truncation, reason = "a logarithm")]
        let power = |value: f64, round: fn(f64) -> f64| round(value.log(base)) as i32;
        let (low, high) = (power(least, f64::floor), power(most, f64::ceil));
        let zeros = values.clone().any(|value| value <= 0.0);
        Self::Logarithmic { low, high: high.max(low + 1), base, every: (high - low).div_euclid(7) + 1, zeros }
    }

    fn is_logarithmic(&self) -> bool {
        matches!(self, Self::Logarithmic { .. })
    }

    fn ticks(&self) -> Vec<f64> {
        match *self {
            Self::Linear { top, step } => {
                let mut ticks = vec![0.0];
                while ticks[ticks.len() - 1] + step * 0.5 < top {
                    ticks.push(ticks.len() as f64 * step);
                }
                ticks
            }
            Self::Logarithmic { low, high, base, every, zeros } => {
                // Where there is room, twice and five times a power of ten, too.
                let between: &[f64] = if base > 9.0 && high - low <= 3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let powers = (low..=high).filter(|power| (power - low) % every == 0);
                let ticks =
                    powers.flat_map(|power| between.iter().map(move |times| times * base.powi(power)));
                let ticks = ticks.filter(|tick| *tick <= base.powi(high));
                zeros.then_some(0.0).into_iter().chain(ticks).collect()
            }
        }
    }

    fn y(&self, value: f64) -> f64 {
        let bottom = TOP + PLOT_HEIGHT;
        match *self {
            Self::Linear { top, .. } => bottom - PLOT_HEIGHT * value / top,
            Self::Logarithmic { low, high, base, zeros, .. } => {
                if value <= 0.0 {
                    return bottom;
                }
                let room = PLOT_HEIGHT - if zeros { ZEROS } else { 0.0 };
                let share = (value.log(base) - f64::from(low)) / f64::from(high - low);
                TOP + room * (1.0 - share)
            }
        }
    }
}

/// 1, 2 or 5 times a power of ten (of bytes: of a unit), so that about five fit below `most`.
fn nice_step(most: f64, unit: Unit) -> f64 {
    if most <= 0.0 {
        return 1.0;
    }
    let whole = match unit {
        Unit::Number => 1.0,
        Unit::Bytes => 1024f64.powf(most.log(1024.0).floor().max(0.0)),
    };
    let rough = most / whole / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().find(|step| step * power >= rough).unwrap_or(10.0);
    step * power * whole
}

impl Unit {
    fn write(self, value: f64) -> String {
        match self {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of bytes")]
            Self::Bytes => bytes(value as u64).replace(".0 ", " "),
            Self::Number if value >= 1e6 => format!("{} M", value / 1e6),
            Self::Number if value >= 1e4 => format!("{} k", value / 1e3),
            Self::Number => format!("{}", (value * 1e6).round() / 1e6),
        }
    }

    fn write_exactly(self, value: f64) -> String {
        match self {
            Self::Bytes => format!("{} ({value})", self.write(value)),
            Self::Number => format!("{:.2}", value),
        }
    }
}
