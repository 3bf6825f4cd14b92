//! What the kernel tells of its swap areas.

/// The areas in `text`, in the form of `/proc/swaps`: below a line of titles, a line for each begins with its path.
pub(crate) fn areas(text: &str) -> impl Iterator<Item = &str> {
    text.lines().skip(1).filter_map(|line| line.split_whitespace().next())
}
