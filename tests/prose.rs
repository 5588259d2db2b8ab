//! The prose of the repository: its links are not broken, and its words are spelled right.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::tools;

/// Adds the Markdown files below a folder to `found`, except build results and dependencies.
fn add_pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if entry.file_type().unwrap().is_dir() {
            if !name.starts_with('.') && name != "target" && name != "node_modules" {
                add_pages(&path, found);
            }
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// Returns the lines of a page that are not in a block of code.
fn prose(page: &str) -> impl Iterator<Item = &str> {
    let mut in_code = false;
    page.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !in_code && !is_fence
    })
}

/// Returns the anchors of a page: one for each heading, made as GitHub makes them.
fn anchors(page: &str) -> HashSet<String> {
    let headings = prose(page).filter_map(|line| Some(line.strip_prefix('#')?.trim_start_matches('#')));
    let anchor = |heading: &str| {
        let kept =
            heading.trim().chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
        kept.flat_map(char::to_lowercase).map(|letter| if letter == ' ' { '-' } else { letter }).collect()
    };
    headings.map(anchor).collect()
}

/// Returns the targets of the links `[text](target)` of a page.
fn link_targets(page: &str) -> Vec<String> {
    let text = prose(page).collect::<Vec<_>>().join("\n");
    let parts = text.split("](").skip(1);
    parts.filter_map(|part| Some(part.split_once(')')?.0.trim().to_owned())).collect()
}

#[test]
fn no_link_within_the_repository_is_broken() {
    let mut all = Vec::new();
    add_pages(tools::root(), &mut all);
    assert!(all.len() > 10, "{all:?}");
    let mut broken = Vec::new();
    for page in &all {
        let text = fs::read_to_string(page).unwrap();
        for target in link_targets(&text) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let file = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let is_valid = file.exists()
                && (anchor.is_empty()
                    || anchors(&fs::read_to_string(&file).unwrap_or_default()).contains(anchor));
            if !is_valid {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

#[tokio::test]
async fn no_word_is_misspelled() {
    let mut typos = tools::typos().unwrap();
    typos.args(["--format", "brief"]).current_dir(tools::root());
    let output = tools::run(typos).await;
    assert!(output.status.success(), "{}", tools::text(&output));
}
