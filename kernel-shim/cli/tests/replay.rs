//! `teardown replay --explain` and `--html` as a person meets them.

mod common;

use common::{stdout as text, teardown};

/// Two programs use a page, one takes it away.
const DISCARD: &str = "\
mmu-gather sequence 1
cpus 4
seed 1
mmu pcid intel keeper
0 map m1 40000000+4 anon write
sync
1 switch m1
1 touch 40000000+4 write
sync
2 switch m1
2 touch 40000000+4 write
sync
0 discard m1 40000000+1
sync
1 touch 40000000+1 read
2 touch 40000000+1 read
end
";

/// The sequence as a file. Each `sync` gets a CPU.
fn file(directory: &tempfile::TempDir, sequence: &str) -> String {
    let path = directory.path().join("small.sequence");
    std::fs::write(&path, sequence.replace("\nsync", "\n0 sync")).expect("written");
    path.to_str().expect("a path of this host").to_owned()
}

/// The drawing, without the explanation and the verdict below it.
fn drawing(text: &str) -> &str {
    text.split_once("\n\n1. ").expect("an explanation").0
}

#[test]
fn the_timeline_of_a_violation_shows_who_cached_cleared_asked_and_freed() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = file(&directory, DISCARD);
    let output = teardown(&["replay", &file, "--fault", "skip-flush", "--explain"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = text(&output);
    let drawn = drawing(&text);
    for word in [
        "CPU 0",
        "> touch 40000000+4",
        "caches 40000000",
        "clears 40000000",
        "m1 gen -> 1",
        "asks CPU 1",
        "answers CPU 0",
        "VIOLATION:",
    ] {
        assert!(drawn.contains(word), "no {word:?} in\n{text}");
    }
    // What happens at other addresses does not explain it.
    assert!(!drawn.contains("uses 40001000"), "{text}");
    let words = &text[drawn.len()..];
    assert!(words.contains("cached that at event "), "{text}");
    assert!(words.contains("raised the generation of m1 to 1 at event "), "{text}");
    assert!(words.contains("Rule G"), "{text}");
    assert!(text.ends_with("NOT CLEAN\n"), "{text}");
}

#[test]
fn a_lost_request_is_told_as_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("lost").to_str().expect("a path of this host").to_owned();
    teardown(&["fuzz", "--ops", "32000", "--fault", "drop-ipi", "-o", &path]);
    let text = text(&teardown(&["replay", &path, "--fault", "drop-ipi", "--explain"]));
    assert!(drawing(&text).contains(" LOST"), "{text}");
    assert!(text.contains(" was lost at event "), "{text}");
}

#[test]
fn a_line_has_at_most_100_characters_and_no_colour_when_nobody_looks() {
    let directory = tempfile::tempdir().expect("a directory");
    let small = file(&directory, DISCARD);
    let many = directory.path().join("many");
    let sequence =
        DISCARD.replace("cpus 4", "cpus 64").replace("2 touch", "63 touch").replace("2 switch", "63 switch");
    std::fs::write(&many, sequence.replace("\nsync", "\n0 sync")).expect("written");
    let many = many.to_str().expect("a path of this host").to_owned();
    for args in [
        &["replay", &small, "--explain"][..],
        &["replay", &small, "--explain", "--all"],
        &["replay", &small, "--explain", "--fault", "skip-flush"],
        &["replay", &small, "--explain", "--all", "--fault", "skip-flush"],
        &["replay", &many, "--explain", "--all"],
    ] {
        let text = text(&teardown(args));
        assert!(!text.contains('\x1b'), "{args:?}: {text}");
        for line in drawing(&text).lines() {
            assert!(line.chars().count() <= 100, "{args:?}: {line}");
        }
    }
}

#[test]
fn a_clean_sequence_has_a_timeline_too_and_all_of_it_is_more() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = file(&directory, DISCARD);
    let outline = teardown(&["replay", &file, "--explain"]);
    assert_eq!(outline.status.code(), Some(0), "{outline:?}");
    let outline = text(&outline);
    for word in ["> discard m1", "m1 gen -> 1", "asks CPU", "flushed", "answers CPU 0"] {
        assert!(outline.contains(word), "no {word:?} in\n{outline}");
    }
    assert!(outline.ends_with("clean\n"), "{outline}");
    let all = text(&teardown(&["replay", &file, "--explain", "--all"]));
    assert!(all.lines().count() > outline.lines().count());
    assert!(all.contains("uses 40000000") && !outline.contains("uses 40000000"), "{all}");
}

#[test]
fn looking_closely_changes_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = file(&directory, DISCARD);
    let plain = text(&teardown(&["replay", &file, "--fault", "skip-flush"]));
    let explained = text(&teardown(&["replay", &file, "--fault", "skip-flush", "--explain"]));
    assert!(explained.ends_with(&plain), "{plain}\nand\n{explained}");
}

#[test]
fn the_page_is_whole_in_itself_and_shows_the_violation() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = file(&directory, DISCARD);
    let html = directory.path().join("page.html");
    let path = html.to_str().expect("a path of this host");
    let output = teardown(&["replay", &file, "--fault", "skip-flush", "--html", path]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let page = std::fs::read_to_string(&html).expect("written");
    for word in ["http", "src=", "@import", "url(", "<link", "fetch("] {
        assert!(!page.contains(word), "{word:?} loads something");
    }
    for word in [
        "<title>small.sequence: ",
        "class=\"mark violation\"",
        "VIOLATION: ",
        "prefers-color-scheme: dark",
        "ArrowDown",
        "0 discard m1 40000000+1</span>",
        "Rule G",
        "data-partner-is=\"Answered at\"",
        "NOT CLEAN",
    ] {
        assert!(page.contains(word), "no {word:?} in {page}");
    }
    // Every link leads to a row that is there.
    let mut links = 0;
    for link in page.split("href=\"#e").skip(1) {
        let row = link.split('"').next().expect("a number");
        assert!(page.contains(&format!("id=\"e{row}\"")), "no row {row}");
        links += 1;
    }
    assert!(links >= 4, "{links} links");
    // Every mark has words, and whoever asks is answered, not the other way round.
    let mut partners = 0;
    for mark in page.lines().filter(|line| line.contains("<button")) {
        let words = mark.strip_suffix("</button></div>").and_then(|mark| mark.rsplit('>').next());
        let words = words.expect("a mark");
        assert!(!words.is_empty(), "a mark without words: {mark}");
        assert_eq!(mark.contains("class=\"mark violation\""), words.starts_with("VIOLATION: "), "{mark}");
        if let Some((_, is)) = mark.split_once("data-partner-is=\"") {
            let expected = if is.starts_with("Answered at\"") { "asks CPU" } else { "answers CPU" };
            assert!(words.starts_with(expected), "{mark}");
            partners += 1;
        }
    }
    assert!(partners >= 2, "{partners} marks with a partner");
}

#[test]
fn the_page_of_a_clean_sequence_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = file(&directory, DISCARD);
    let html = directory.path().join("page.html");
    let output = teardown(&["replay", &file, "--html", html.to_str().expect("a path of this host")]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let page = std::fs::read_to_string(&html).expect("written");
    assert!(page.contains("clean: no violation was found") && !page.contains("class=\"mark violation\""));
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = file(&directory, DISCARD);
    for args in [
        &["replay", &file, "--all"][..],
        &["replay", &file, "--explain", "--format", "json"],
        &["replay", &file, "--html", "/nonexistent/page.html"],
    ] {
        assert_eq!(teardown(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_sequence_of_another_kernel_is_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let theirs = file(&directory, &format!("# StaleAtRest\n# kernel their_kernel::Kernel\n{DISCARD}"));
    let output = teardown(&["replay", &theirs]);
    assert_eq!(output.status.code(), Some(2));
    let told = common::stderr(&output);
    assert!(told.contains("their_kernel::Kernel") && told.contains("mmu_hosted::replay"), "{told}");
}
