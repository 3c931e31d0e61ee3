//! Sequences as text.

use mmu_hosted::{Op, Quirk, Quirks, Sequence, generate, with_cpus_going_off};

const LENGTH: usize = 160;

#[test]
fn a_sequence_survives_its_text() {
    for seed in 0..200 {
        let sequence = with_cpus_going_off(generate(seed, 4, LENGTH));
        let text = sequence.to_string();
        assert_eq!(Sequence::parse(&text).as_ref(), Ok(&sequence), "{text}");
    }
}

#[test]
fn a_text_that_is_none_is_refused_at_its_line() {
    let good = generate(1, 4, 3).to_string();
    let lines: Vec<&str> = good.lines().collect();
    for (at, bad) in [
        (0, "mmu-gather sequence 2"),
        (1, "cpus 0"),
        (1, "cpus 193"),
        (2, "seed x"),
        (3, "mmu pcid intel"),
        (3, "mmu pcid intel keeper iommu"),
        (3, "mmu pcid intel keeper split-tlb both"),
        (4, "0 map m8 1000+1 anon write"),
        (4, "0 map m0 1001+1 anon write"),
        (4, "0 map m0 1000+0 anon write"),
        (4, "0 unmap m0 fffffffffff000+2"),
        (4, "0 unmap m0 1000+ffffffffffffffff"),
        (3, "mmu pcid intel keeper frames=3"),
        (4, "0 map m0 1000+1 giants write"),
        (4, "0 exec m0"),
        (4, "0 lazy now"),
        (4, "0 leap"),
        (4, "0 preempt"),
        (4, "0 preempt soon"),
        (4, "0 frames"),
        (4, "0 frames nth-"),
        (4, "0 frames nth-soon"),
        (4, "0 guard m0 1000+1"),
        (4, "0 guard m0 1000+1 away"),
        (4, "x lazy"),
        (4, "4 lazy"),
        (4, "191 lazy"),
        (4, "0 lazy#no comment"),
        (7, "end\n0 lazy"),
    ] {
        let mut broken = lines.clone();
        broken[at] = bad;
        let error = Sequence::parse(&broken.join("\n")).expect_err(bad);
        let line = at + 1 + bad.matches('\n').count();
        assert_eq!(error.line, line, "{bad}: {error}");
        // Comments are lines.
        for before in 0..=at {
            let mut commented = broken.clone();
            commented.splice(before..before, ["# one", "  # two"]);
            let error = Sequence::parse(&commented.join("\n")).expect_err(bad);
            assert_eq!(error.line, line + 2, "{bad}, comments before line {}: {error}", before + 1);
        }
    }
    // Cut short anywhere, it is noticed.
    for kept in 0..lines.len() {
        let error = Sequence::parse(&lines[..kept].join("\n")).expect_err("it has no end");
        assert_eq!(error.line, kept + 1, "{error}");
        let commented = [&lines[..kept], &["# the end is missing"]].concat().join("\n");
        let error = Sequence::parse(&commented).expect_err("it has no end");
        assert_eq!(error.line, kept + 2, "{error}");
    }
}

#[test]
fn blank_lines_and_comments_say_nothing_wherever_they_stand() {
    let sequence = generate(1, 4, 20);
    let text = sequence.to_string();
    for changed in [
        text.replace('\n', "\n\n  \n"),
        text.replace('\n', "  # why\n"),
        text.replace('\n', "\r\n\t# why # it is\n"),
        format!("\n# first\n{text}\n\n# last\n"),
    ] {
        assert_eq!(Sequence::parse(&changed).as_ref(), Ok(&sequence), "{changed}");
    }
}

/// Once, a step of CPU 7 on a machine of four was taken for one of CPU 3.
#[test]
fn bytes_name_no_cpu_that_the_machine_does_not_have() {
    for seed in 0..2000_u64 {
        let mut state = seed;
        let bytes: Vec<u8> = core::iter::repeat_with(|| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .take(120)
        .collect();
        let sequence = Sequence::from_bytes(&bytes);
        assert_eq!(Sequence::parse(&sequence.to_string()).as_ref(), Ok(&sequence), "{sequence}");
    }
}

#[test]
fn cpus_but_the_first_go_off_and_come_back_in_turn_and_nothing_else_changes() {
    for seed in 0..50 {
        let before = generate(seed, 4, LENGTH);
        let mut after = with_cpus_going_off(before.clone());
        let mut is_off = [false; 4];
        let mut times = 0;
        after.steps.retain(|step| {
            let off = &mut is_off[usize::from(step.cpu)];
            match step.op {
                Op::Offline => assert!(!core::mem::replace(off, true) && step.cpu != 0),
                Op::Online => assert!(core::mem::replace(off, false)),
                _ => return true,
            }
            times += 1;
            false
        });
        assert!(times > 5, "seed {seed}: {times}");
        assert_eq!(after, before);
    }
    let alone = generate(1, 1, LENGTH);
    assert_eq!(with_cpus_going_off(alone.clone()), alone);
}

#[test]
fn going_off_and_coming_back_survive_as_bytes() {
    let sequence = with_cpus_going_off(generate(3, 4, 100));
    let again = Sequence::from_bytes(&sequence.to_bytes());
    let ops = |sequence: &Sequence| sequence.steps.iter().map(|step| step.op.number()).collect::<Vec<_>>();
    assert_eq!(ops(&again), ops(&sequence));
}

#[test]
fn what_a_machine_is_besides_survives_its_text_and_its_bytes_and_need_not_be_said() {
    let plain = Sequence { quirks: Quirks::default(), ..generate(1, 4, 20) };
    let bytes = plain.to_bytes();
    assert_eq!(Sequence::parse(&plain.to_string()).as_ref(), Ok(&plain));
    for quirk in Quirk::ALL {
        let quirks = Quirks::default().with(quirk).with(Quirk::SplitTlb);
        let sequence = Sequence { quirks, ..plain.clone() };
        let text = sequence.to_string();
        assert_eq!(Sequence::parse(&text).as_ref(), Ok(&sequence), "{text}");
        assert!(text.contains(quirk.word()), "{text}");
        let with = sequence.to_bytes();
        assert_eq!(Sequence::from_bytes(&with), Sequence { quirks, ..Sequence::from_bytes(&bytes) });
        // What is said comes between the header and the steps, which stay as they are.
        assert_eq!((&with[..10], &with[26..]), (&bytes[..10], &bytes[10..]));
    }
}
