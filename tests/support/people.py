"""One person, as an endpoint is asked about."""

PERSON = {
    "Workclass": "Private",
    "Education": "Bachelors",
    "Marital-Status": "Never-married",
    "Occupation": "Sales",
    "Relationship": "Own-child",
    "Race": "White",
    "Sex": "Male",
    "Native_country": "United-States",
}
