"""Clinical data standards: MEDS event streams into records and back, OMOP and FHIR into MEDS. Plain functions over Arrow."""
