//! Every request for memory refused in turn: of every operation, on states of every kind.

use std::collections::{BTreeMap, BTreeSet};

use mmu_adapter::{Case, Refusal, refuse_each};
use mmu_hosted::Op;

/// What a state is called, and the steps that make it. The program on the second CPU has used what
/// is there.
const STATES: [(&str, &str); 15] = [
    ("nothing", "0 lazy"),
    ("small pages", "0 map m0 40000000+80 anon write\n0 switch m0\n1 switch m0\n1 touch 40000000+60 write"),
    (
        "tables of every level end",
        "0 map m0 7fff8000+16 anon write\n0 map m0 7ffffffc000+8 anon write\n0 map m0 40000000+2 anon write\n\
         0 switch m0\n1 switch m0\n1 touch 40000000+2 write\n1 touch 7fff8000+3 write\n1 touch 7ffffffc000+1 write",
    ),
    (
        "large pages",
        "0 map m0 40000000+1024 huge write\n0 switch m0\n1 switch m0\n1 touch 40000000+12 write\n\
         1 touch 40200000+1 write",
    ),
    (
        "large clean pages",
        "0 map m0 40000000+1024 clean write\n0 switch m0\n1 switch m0\n1 touch 40000000+2 read\n\
         1 touch 40200000+1 read",
    ),
    ("folios", "0 map m0 40000000+64 folios write\n0 switch m0\n1 switch m0\n1 touch 40000000+40 write"),
    (
        "a shared file",
        "0 map m0 40000000+60 shared write\n0 switch m0\n1 switch m0\n1 touch 40000000+40 write\n\
         1 touch 40028000+8 read",
    ),
    (
        "a private file",
        "0 map m0 40000000+60 private write\n0 switch m0\n1 switch m0\n1 touch 40000000+12 read\n\
         1 touch 40004000+30 write",
    ),
    (
        "zeroes",
        "0 map m0 40000000+60 anon write\n0 switch m0\n1 switch m0\n1 touch 40000000+20 read\n\
         1 touch 40014000+4 write",
    ),
    (
        "swap",
        "0 map m0 40000000+60 anon write\n0 switch m0\n1 switch m0\n1 touch 40000000+24 write\n\
         0 reclaim m0 m0 40000000+16",
    ),
    (
        "guards",
        "0 map m0 40000000+60 anon write\n0 switch m0\n1 switch m0\n1 touch 40000000+24 write\n\
         0 guard m0 40008000+6 install",
    ),
    (
        "a stack",
        "0 map m0 50000000+16 stack write\n0 switch m0\n1 switch m0\n1 touch 50000000+12 write\n\
         0 map m0 40000000+4 anon write\n0 touch 40000000+4 write",
    ),
    (
        "shared by fork",
        "0 map m0 40000000+60 anon write\n0 switch m0\n1 switch m0\n1 touch 40000000+24 write\n0 fork m0 m1\n\
         1 switch m1",
    ),
    ("device frames that nobody has used", "0 map m0 40000000+40 pfn write\n0 switch m0\n1 switch m0"),
    ("device frames", "0 map m0 40000000+40 pfn write\n0 switch m0\n1 switch m0\n1 touch 40000000+12 write"),
];

const OPS: [(&str, Refusal); 45] = [
    ("0 map m0 60000000+8 anon write", Refusal::Clean),
    ("0 map m0 60000000+1024 huge write", Refusal::InTheWay),
    ("0 map m0 60000000+512 clean write", Refusal::InTheWay),
    ("0 unmap m0 40000000+1024", Refusal::Clean),
    ("0 unmap m0 40008000+8", Refusal::Clean),
    ("0 unmap m0 401f8000+16", Refusal::Clean),
    ("0 unmap m0 0+134217728", Refusal::Clean),
    ("0 discard m0 40000000+1024", Refusal::Clean),
    ("0 discard m0 40004000+6", Refusal::Clean),
    ("0 discard m0 401f8000+16", Refusal::Clean),
    ("0 protect m0 40000000+1024 read", Refusal::Clean),
    ("0 protect m0 40008000+4 none", Refusal::Clean),
    ("0 protect m0 401f8000+16 read", Refusal::Clean),
    ("0 protect m0 40000000+60 write", Refusal::Clean),
    ("0 remap m0 40000000+16 60000000", Refusal::Clean),
    ("0 remap m0 40000000+1024 7fff8000000", Refusal::Clean),
    ("0 remap m0 40004000+20 7ffffffa000", Refusal::Clean),
    ("0 remap m0 401f8000+16 601f8000", Refusal::Clean),
    ("0 movestack m0 50000000+16 8", Refusal::Clean),
    ("0 movestack m0 50000000+16 600", Refusal::Clean),
    ("0 movestack m0 40000000+1 600", Refusal::Clean),
    ("0 fork m0 m1", Refusal::Clean),
    ("0 fork m0 m2", Refusal::Clean),
    ("0 exit m0", Refusal::Clean),
    ("0 exec m0 8", Refusal::OfACall),
    ("0 exec m0 600", Refusal::OfACall),
    ("0 reclaim m0 m0 40000000+1024", Refusal::Clean),
    ("0 reclaim m0 m1 40000000+30", Refusal::Clean),
    ("0 touch 40000000+24 read", Refusal::InPart),
    ("0 touch 40000000+30 write", Refusal::InPart),
    ("0 touch 40020000+24 read", Refusal::InPart),
    ("1 touch 7fff8000+16 write", Refusal::InPart),
    ("1 touch 7ffffffc000+8 write", Refusal::InPart),
    ("1 touch 4fff0000+2 write", Refusal::InPart),
    ("0 guard m0 40000000+60 install", Refusal::InPart),
    ("0 guard m0 40004000+8 install", Refusal::InPart),
    ("0 guard m0 40000000+60 remove", Refusal::Clean),
    ("0 switch m1", Refusal::Clean),
    ("0 lazy", Refusal::Clean),
    ("0 wake", Refusal::Clean),
    ("0 preempt 3", Refusal::Clean),
    ("0 sync", Refusal::Clean),
    ("1 offline", Refusal::Clean),
    ("1 online", Refusal::Clean),
    ("0 frames always", Refusal::Clean),
];

/// Operations that say how scarce something is: with two of them there is nothing to see.
const OF_SUPPLY: [&str; 2] = ["batches", "tables"];

#[test]
fn whichever_request_is_refused_programs_see_all_of_a_call_or_nothing_and_a_second_try_succeeds() {
    let mut refused: BTreeMap<(String, String), u32> = BTreeMap::new();
    let mut words: BTreeSet<&str> = OF_SUPPLY.into();
    for (name, state) in STATES {
        for (op, refusal) in OPS {
            let word = op.split(' ').nth(1).expect("a CPU, then a word");
            words.insert(word);
            let all = refuse_each(&Case { state, op, refusal }).expect("memory");
            let all = all.unwrap_or_else(|wrong| panic!("{name}, {op}: {wrong}"));
            for one in all {
                *refused.entry((word.to_owned(), format!("{:?}", one.site))).or_default() += 1;
            }
        }
    }
    assert_eq!(words, Op::WORDS.into(), "an operation that is not tried");
    for ((word, site), times) in &refused {
        println!("{word:<10} {site:<12} {times}");
    }
    println!("{} requests refused", refused.values().sum::<u32>());
    // What asks for memory: a call that comes to ask, or a site that is not reached any more.
    let asks = |word: &str, site: &str| refused.contains_key(&(word.to_owned(), site.to_owned()));
    for (word, sites) in [
        ("map", &["Table", "Block"][..]),
        ("unmap", &["Batch", "Table"]),
        ("discard", &["Batch", "Table"]),
        ("protect", &["Table"]),
        ("remap", &["Table"]),
        ("movestack", &["Table"]),
        ("fork", &["Root", "Table"]),
        ("exit", &["Root", "Batch"]),
        ("exec", &["Root", "Table"]),
        ("touch", &["Table", "Page", "FilePage", "DeviceFrame"]),
        ("guard", &["Batch", "Table"]),
    ] {
        for site in sites {
            assert!(asks(word, site), "{word} asks for nothing at {site}: {refused:?}");
        }
    }
    for site in ["Batch", "Table", "Root", "Page"] {
        assert!(!asks("reclaim", site), "reclaim frees memory, and asks for some at {site}");
    }
}
