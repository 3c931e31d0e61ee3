//! The choice a sweep makes, and where its charts put things.

use crate::sweep::answer::Answer;
use crate::sweep::axes::{Arrangement, Batch, Ceiling, Conditions, CpuMix, NrPages, Refuse};
use crate::sweep::chart::{Chart, Place, Series, Unit};
use crate::sweep::measure::{Measured, Timing};
use crate::sweep::tally::Counts;

const SETTINGS: [Batch; 3] =
    [Batch::Bundle, Batch::Pages { pages: 1, slots: 510 }, Batch::Pages { pages: 19, slots: 510 }];

/// The three settings under one set of conditions: 1000 pages, so many flushes (and interrupts), so
/// many nanoseconds a page.
fn group(conditions: Conditions, flushes: [u64; 3], ns: [f64; 3]) -> Vec<Measured> {
    let cell = |index: usize| Measured {
        batch: SETTINGS[index],
        conditions,
        counts: Counts {
            pages: 1000,
            flushes: flushes[index],
            ipis_sent: flushes[index],
            bytes_unfreed_peak: 4096 << (4 * index),
            ..Counts::default()
        },
        measured: Some(Timing { ns_per_page_median: ns[index], ns_per_page_min: ns[index], samples: 1 }),
    };
    (0..3).map(cell).collect()
}

#[test]
fn of_the_settings_within_5_percent_that_which_holds_least_is_taken() {
    let cells = group(Conditions::BASE, [100, 2, 1], [10.0, 10.0, 9.6]);
    // 110, 12.0 and 10.6 with interrupts of 1000 ns; 10.0, 10.0 and 9.6 without.
    let choice = |ipi_ns| Answer::new(&cells, ipi_ns).expect("there is a choice").choice;
    assert_eq!(choice(1000), SETTINGS[2]);
    assert_eq!(choice(0), SETTINGS[0]);
    // 10.4, 10.008 and 9.604.
    assert_eq!(choice(4), SETTINGS[1]);
}

#[test]
fn conditions_under_which_all_settings_flush_alike_do_not_count() {
    let small = Conditions { size: NrPages(1), ..Conditions::BASE };
    let mut cells = group(small, [1, 1, 1], [1.0, 50.0, 50.0]);
    assert!(Answer::new(&cells, 1000).is_none());
    cells.extend(group(Conditions::BASE, [100, 2, 1], [10.0, 10.0, 10.0]));
    let answer = Answer::new(&cells, 1000).expect("there is a choice");
    assert_eq!((answer.considered, answer.conditions), (1, 2));
    assert_eq!(answer.memory_at, Conditions::BASE);
    assert_eq!(answer.choice, SETTINGS[2]);
}

#[test]
fn ratios_are_a_geometric_mean_and_the_worst_is_named() {
    let sparse = Conditions { shape: Arrangement::Sparse, ..Conditions::BASE };
    let mut cells = group(Conditions::BASE, [2, 1, 1], [8.0, 2.0, 2.0]);
    cells.extend(group(sparse, [2, 1, 1], [6.0, 6.0, 6.0]));
    let answer = Answer::new(&cells, 0).expect("there is a choice");
    let bundle = answer.settings[0];
    assert!((bundle.mean_ratio - 2.0).abs() < 1e-9 && (bundle.worst_ratio - 4.0).abs() < 1e-9, "{bundle:?}");
    assert_eq!(bundle.worst_at, Conditions::BASE);
    assert!(
        answer
            .words()
            .concat()
            .contains("Take 510 (Limits::DEFAULT.with_batch_pages(1).with_batch_slots(510))")
    );
}

#[test]
fn memory_is_compared_at_the_base_or_else_where_most_pages_go() {
    let of_size = |pages| Conditions { size: NrPages(pages), ..Conditions::BASE };
    let mut cells = group(of_size(600), [3, 2, 1], [10.0; 3]);
    cells.extend(group(of_size(9000), [3, 2, 1], [10.0; 3]));
    cells.extend(group(of_size(700), [3, 2, 1], [10.0; 3]));
    assert_eq!(Answer::new(&cells, 0).expect("there is a choice").memory_at, of_size(9000));
    cells.extend(group(Conditions::BASE, [3, 2, 1], [10.0; 3]));
    cells.extend(group(of_size(90_000), [3, 2, 1], [10.0; 3]));
    assert_eq!(Answer::new(&cells, 0).expect("there is a choice").memory_at, Conditions::BASE);
}

#[test]
fn a_setting_without_times_leaves_no_choice() {
    let mut cells = group(Conditions::BASE, [100, 2, 1], [10.0, 10.0, 10.0]);
    cells[1].measured = None;
    assert!(Answer::new(&cells, 1000).is_none());
}

#[test]
fn what_an_axis_prints_it_reads() {
    for batch in Batch::ALL {
        assert_eq!(batch.to_string().parse::<Batch>().expect("printed"), batch);
    }
    // One page of eight slots or fewer is not the eight on the stack.
    let small = Batch::Pages { pages: 1, slots: 8 };
    assert_eq!(small.to_string().parse::<Batch>().expect("printed"), small);
    for size in NrPages::ALL {
        assert_eq!(size.to_string().parse::<NrPages>().expect("printed"), size);
    }
    for layout in Arrangement::ALL {
        assert_eq!(layout.to_string().parse::<Arrangement>().expect("printed"), layout);
    }
    for cpus in CpuMix::ALL {
        assert_eq!(cpus.to_string().parse::<CpuMix>().expect("printed"), cpus);
    }
    for ceiling in Ceiling::ALL {
        assert_eq!(ceiling.to_string().parse::<Ceiling>().expect("printed"), ceiling);
    }
    for refuse in Refuse::ALL {
        assert_eq!(refuse.to_string().parse::<Refuse>().expect("printed"), refuse);
    }
}

fn draw(unit: Unit, values: &[f64]) -> String {
    let places: Vec<Place> = (0..values.len())
        .map(|place| Place { label: format!("p{place}"), joined: true, chosen: place == 1 })
        .collect();
    let series = [Series { name: "only".into(), values: values.iter().copied().map(Some).collect() }];
    Chart { x_name: "x", y_name: "y", unit, places: &places, series: &series }.svg()
}

/// The heights of the marks, in the order drawn; down is more.
fn heights(svg: &str) -> Vec<f64> {
    svg.split("class=\"mark\" d=\"M")
        .skip(1)
        .map(|rest| {
            let numbers = rest.split(['a', 'L']).next().and_then(|point| point.split(' ').nth(1));
            numbers.and_then(|y| y.parse().ok()).expect("a mark begins at a point")
        })
        .collect()
}

#[test]
fn near_values_get_a_linear_scale_from_zero_and_far_ones_a_logarithmic_one() {
    let near = draw(Unit::Number, &[1.0, 2.0, 4.0]);
    assert!(!near.contains("(log)"));
    assert!(near.contains(">0</text>") && near.contains(">4</text>"), "{near}");
    let [low, middle, high] = heights(&near)[..] else { panic!("three marks in {near}") };
    assert!(((low - middle) * 2.0 - (middle - high)).abs() < 0.3, "{low} {middle} {high}");

    let far = draw(Unit::Number, &[1.0, 100.0, 10_000.0]);
    assert!(far.contains("y (log)"));
    let [low, middle, high] = heights(&far)[..] else { panic!("three marks in {far}") };
    assert!(((low - middle) - (middle - high)).abs() < 0.3, "{low} {middle} {high}");
}

#[test]
fn zeros_on_a_logarithmic_scale_lie_on_a_line_of_their_own() {
    let svg = draw(Unit::Number, &[0.0, 1.0, 1000.0]);
    assert!(svg.contains("(log)") && svg.contains(">0</text>"), "{svg}");
    let [zero, one, most] = heights(&svg)[..] else { panic!("three marks in {svg}") };
    assert!(zero - one > 10.0 && one > most, "{zero} {one} {most}");
    // Nothing but zeros is a chart, too.
    assert!(heights(&draw(Unit::Number, &[0.0, 0.0])).iter().all(|height| height.is_finite()));
}

#[test]
fn bytes_are_labelled_in_powers_of_two_and_a_mark_tells_its_number() {
    let svg = draw(Unit::Bytes, &[4096.0, 1_048_576.0]);
    for words in
        [">4 KiB</text>", ">1 MiB</text>", "<title>only, p0: y 4 KiB (4096)</title>", "class=\"chosen\""]
    {
        assert!(svg.contains(words), "no {words} in {svg}");
    }
}

#[test]
fn a_value_that_is_missing_breaks_the_line() {
    let place = |label: &str| Place { label: label.into(), joined: true, chosen: false };
    let series = [Series { name: "s".into(), values: vec![Some(1.0), None, Some(1.0)] }];
    let places = [place("a"), place("b"), place("c")];
    let svg = Chart { x_name: "x", y_name: "y", unit: Unit::Number, places: &places, series: &series }.svg();
    assert_eq!(heights(&svg).len(), 2);
    let line = svg.split("stroke-dasharray=\"\" d=\"").nth(1).and_then(|rest| rest.split('"').next());
    assert_eq!(line.map(|line| line.matches('M').count()), Some(2), "{line:?}");
}
