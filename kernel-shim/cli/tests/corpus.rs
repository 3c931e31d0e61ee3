//! `teardown fuzz --corpus` as a person meets it: campaigns that go on from run to run.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use mmu_hosted::Sequence;
use serde_json::Value;

use common::{json, stdout as text, teardown};

/// Runs 64 sequences of eight operations, with more flags.
fn fuzz(corpus: &Path, more: &[&str]) -> Value {
    let corpus = corpus.to_str().expect("a path of this host");
    let failure = format!("{corpus}.failure");
    let mut args =
        vec!["fuzz", "--ops", "512", "--length", "8", "--corpus", corpus, "-o", &failure, "--format", "json"];
    args.extend(more);
    let output = teardown(&args);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    json(&output)
}

fn kept(corpus: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(corpus.join("sequences")).expect("a folder");
    files.map(|entry| entry.expect("an entry").path()).collect()
}

#[test]
fn a_campaign_goes_on_where_it_stopped_and_runs_no_sequence_twice() {
    let directory = tempfile::tempdir().expect("a directory");
    let in_parts = directory.path().join("parts");
    let first = fuzz(&in_parts, &[]);
    assert_eq!(first["corpus"]["this_build"]["sequences"], 64, "{first}");
    let second = fuzz(&in_parts, &["--jobs", "3"]);
    assert_eq!(second["sequences"], 64, "{second}");
    let sum =
        first["operations"].as_u64().expect("a number") + second["operations"].as_u64().expect("a number");
    assert_eq!(second["corpus"]["this_build"]["sequences"], 128, "{second}");
    assert_eq!(second["corpus"]["this_build"]["operations"], sum, "{second}");
    assert_eq!(second["corpus"]["unread_files"], 0, "{second}");
    // What the first has kept is known to the second, and what the second has run is new.
    let grown = second["kept"]["features"].as_u64() > first["kept"]["features"].as_u64();
    assert!(grown, "{first} {second}");
    let files = kept(&in_parts);
    assert_eq!(second["kept"]["sequences"], files.len(), "{second}");
    let texts = files.iter().map(|file| fs::read_to_string(file).expect("text"));
    let sequences: Vec<_> =
        texts.map(|text| Sequence::parse(&text).expect("a sequence").to_string()).collect();
    assert_eq!(sequences.iter().collect::<BTreeSet<_>>().len(), files.len(), "no sequence came twice");
    // Another seed is another campaign, in the same totals.
    let third = fuzz(&in_parts, &["--seed", "2", "--unguided"]);
    assert_eq!(third["corpus"]["this_build"]["sequences"], 192, "{third}");
}

#[test]
fn the_summary_counts_all_runs() {
    let directory = tempfile::tempdir().expect("a directory");
    let corpus = directory.path().join("corpus");
    fuzz(&corpus, &[]);
    let failure = directory.path().join("failure");
    let [corpus, failure] = [&corpus, &failure].map(|path| path.to_str().expect("a path of this host"));
    let output = teardown(&["fuzz", "--ops", "8", "--length", "8", "--corpus", corpus, "-o", failure]);
    let text = text(&output);
    assert!(text.starts_with("1 sequence, 8 operations, "), "{text}");
    assert!(text.contains("\nin this corpus: 65 sequences, "), "{text}");
    assert!(
        text.contains(" never overlapped: ") && text.contains("\nnever counted by the kernel: "),
        "{text}"
    );
    assert!(text.ends_with("\nclean\n"), "{text}");
}

#[test]
fn what_is_no_sequence_is_passed_over_and_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let corpus = directory.path().join("corpus");
    fuzz(&corpus, &[]);
    // Of a version that knows more, cut short, and not text at all.
    let good = fs::read_to_string(&kept(&corpus)[0]).expect("text");
    let broken = [
        ("a", good.replace("\nend\n", "\n0 leap\nend\n").into_bytes()),
        ("b", good.as_bytes()[..good.len() / 2].to_vec()),
        ("c", vec![0xff; 100]),
    ];
    for (name, content) in broken {
        fs::write(corpus.join("sequences").join(format!("{name}.sequence")), content).expect("written");
    }
    fs::write(corpus.join("sequences/README"), "not looked at").expect("written");
    let report = fuzz(&corpus, &[]);
    assert_eq!(report["corpus"]["unread_files"], 3, "{report}");
    let first = report["corpus"]["first_unread"].as_str().expect("words");
    assert!(first.starts_with("a.sequence: line ") && first.contains("expected an operation"), "{first}");
    assert_eq!(report["corpus"]["this_build"]["sequences"], 128, "{report}");
}

#[test]
fn what_other_builds_have_done_is_counted_for_itself_and_their_sequences_are_gone_on_from() {
    let directory = tempfile::tempdir().expect("a directory");
    let corpus = directory.path().join("corpus");
    let first = fuzz(&corpus, &[]);
    let campaigns = corpus.join("campaigns");
    for entry in fs::read_dir(&campaigns).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_str().expect("text").to_owned();
        fs::rename(&path, campaigns.join(format!("0.0.9-{name}"))).expect("renamed");
    }
    let second = fuzz(&corpus, &[]);
    assert_eq!(second["corpus"]["this_build"]["sequences"], 64, "{second}");
    assert_eq!(second["corpus"]["other_builds"]["sequences"], 64, "{second}");
    assert!(second["kept"]["sequences"].as_u64() >= first["kept"]["sequences"].as_u64(), "{second}");
}

#[test]
fn a_folder_that_cannot_be_used_and_one_campaign_twice_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let corpus = directory.path().join("corpus");
    fuzz(&corpus, &[]);
    let path = corpus.to_str().expect("a path of this host");
    let lock = fs::read_dir(corpus.join("campaigns")).expect("a folder").find_map(|entry| {
        let path = entry.expect("an entry").path();
        path.extension().is_some_and(|extension| extension == "lock").then_some(path)
    });
    let held = fs::File::open(lock.expect("a lock")).expect("it is there");
    held.lock().expect("nobody holds it");
    let refused = |args: &[&str], said: &str| {
        let output = teardown(&[&["fuzz", "--ops", "512", "--length", "8"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(said), "{error}");
    };
    refused(&["--corpus", path], "give this one another --seed");
    fuzz(&corpus, &["--seed", "9"]);
    let file = directory.path().join("file");
    fs::write(&file, "").expect("written");
    refused(&["--corpus", file.to_str().expect("a path of this host")], "cannot use the corpus");
    refused(&["--corpus", path, "--fault", "drop-ipi"], "--fault");
}

/// How much more depends on chance; over four seeds it was a tenth.
#[test]
fn sequences_made_from_those_that_went_somewhere_new_reach_more_than_made_up_ones() {
    let directory = tempfile::tempdir().expect("a directory");
    let failure = directory.path().join("failure");
    let reached = |more: &[&str]| {
        let seeds = ["1", "2", "3", "4"].into_iter();
        let features = seeds.map(|seed| {
            let failure = failure.to_str().expect("a path of this host");
            let args =
                ["fuzz", "--ops", "3200", "--length", "8", "--seed", seed, "--format", "json", "-o", failure];
            let report = json(&teardown(&[&args, more].concat()));
            assert_eq!(report["clean"], true, "{report}");
            report["kept"]["features"].as_u64().expect("a number")
        });
        features.sum::<u64>()
    };
    let (guided, made_up) = (reached(&[]), reached(&["--unguided"]));
    assert!(guided > made_up, "{guided} features, and {made_up} of made-up sequences");
}
